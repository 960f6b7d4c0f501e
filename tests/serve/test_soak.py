"""Clients of every kind at once, for seconds; benchmarks/soak.py does the same with hundreds for minutes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from tests.serve.bad_requests import bad_requests
from tests.serve.live import Live, live
from tests.serve.mixed_requests import mixed_requests
from tests.serve.population import Known, Population, Tally
from tests.serve.prober import Prober, Probes
from tests.serve.soak_model import LONG_TEXT, soak_sections
from tests.serve.streams import Asked, ask

pytestmark = pytest.mark.alone  # it counts tokens in a time

NUM_CLIENTS = 60
SECONDS = 8.0
HANGING_S = 20.0  # no answer takes so long on a machine however slow, unless something holds the event loop
MAX_BODY = 2**20 + 2**16


class Soaked(NamedTuple):
    """What came of it. left: what there was more of after than before, by name."""

    tally: Tally
    probes: list[Probes]
    left: dict[str, int]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    limits = {"stalled_client_s": 1.0, "body_timeout_s": 20.0, "max_body": MAX_BODY, "access_log": False}
    with live(soak_sections(tmp_path_factory.mktemp("soak"), max_sequences=72, kv_cache="12MiB", **limits)) as server:
        yield server


def held(server: Live) -> Counter[str]:
    """What requests hold while they run."""

    async def tasks() -> int:
        return len(asyncio.all_tasks())

    [stats] = server.engine.replica_stats()
    return Counter(
        running=stats.running,
        waiting=stats.waiting,
        pages_used=stats.pages_used,
        calls=server.front.service.num_open,
        engine_calls=len(server.engine._calls),
        connections=len(server.server.server_state.connections),
        tasks=server.run(tasks),
        threads=threading.active_count(),
        descriptors=len(list(Path("/proc/self/fd").iterdir())),
    )


async def soak(server: Live) -> Soaked:
    bad = bad_requests(long_text=LONG_TEXT, max_body=MAX_BODY)
    async with aiohttp.ClientSession(server.url) as session:
        known = []
        for path, body in mixed_requests(24, max_tokens=48):
            asked = Asked(path, {**body, "return_token_ids": True})
            known.append(Known(asked, await ask(session, asked)))
    async with Population(server.url, known, bad) as clients:
        await asyncio.gather(*[clients.err(each) for each in bad])  # makes what is made at the first use
    before = await settled(server)
    probers = [Prober(server.url, keeps=keeps) for keeps in (True, False)]
    async with Population(server.url, known, bad, patience_s=1.0, seed=1) as clients:
        await clients.live(NUM_CLIENTS, SECONDS)
    probes = [prober.stop() for prober in probers]
    return Soaked(clients.tally, probes, dict(await settled(server, before) - before))


async def settled(server: Live, at_most: Counter[str] | None = None) -> Counter[str]:
    """What is held once it is no more than that, or stays the same for a while."""
    until_s = time.monotonic() + 20.0
    while True:
        last = await asyncio.to_thread(held, server)
        await asyncio.sleep(0.5)
        now = await asyncio.to_thread(held, server)
        if time.monotonic() > until_s or (now == last if at_most is None else now <= at_most):
            return now


@pytest.fixture(scope="module")
def soaked(server: Live) -> Soaked:
    return asyncio.run(soak(server))


def test_no_token_is_lost_or_crossed(soaked: Soaked) -> None:
    assert soaked.tally.problems == []
    assert soaked.tally.tokens > 1000


def test_all_kinds_of_clients_were_there(soaked: Soaked) -> None:
    assert len(soaked.tally.done) == 10, soaked.tally.done


def test_nothing_is_left_of_them(soaked: Soaked) -> None:
    assert soaked.left == {}


def test_health_is_answered_meanwhile(soaked: Soaked) -> None:
    for probes in soaked.probes:
        assert probes.problems == []
        assert sum(latency > HANGING_S for latency in probes.latencies_s) == 0
