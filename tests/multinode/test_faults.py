"""Faults of the link under a formation that generates: cut and restored, cut for good, throttled."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
from tests.multinode.net_engine import NetEngine
from tests.multinode.netlab import Net
from tests.tiny_models import TINY_MODELS, VOCAB, make

pytestmark = pytest.mark.alone  # it compares times, and looks at everybody's shared memory

CUT_S = 1.5
LIMIT_S = 2.0
LONG = [[(17 * prompt + 5 * place) % VOCAB for place in range(200)] for prompt in range(4)]
SHORT = [prompt[:6] for prompt in LONG]


class Layout(NamedTuple):
    """rate_mbit: at which the tokens of a long prompt take some tens of milliseconds to cross the link."""

    parallel: dict[str, int]
    rate_mbit: float


LAYOUTS = {"pipeline": Layout({"pipeline": 2}, 20.0), "tensor": Layout({"tensor": 2}, 200.0)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(shared_net: Net) -> Iterator[NetEngine]:
    """A rank on alpha, beside the engine, and one on beta."""
    engine = NetEngine(shared_net, ["alpha", "beta"])
    yield engine
    engine.process.communicate(timeout=30)


Open = Callable[..., NetEngine]


@pytest.fixture
def opened(net: Net, engine: NetEngine, model: Path) -> Iterator[Open]:
    """Opens a formation of a layout; it is closed at the end, where the test has not."""
    running: list[NetEngine] = []

    def open_one(layout: Layout, timeout_s: float) -> NetEngine:
        engine.open(
            {
                "model": {"path": str(model), "dtype": "float32"},
                "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": 1.0},
                "parallel": layout.parallel,
                "comm": {"timeout_s": timeout_s},
                "engine": {"kv_cache": "4MiB", "max_batch_tokens": 256, "prefix_cache": False},
            }
        )
        running.append(engine)
        return engine

    yield open_one
    for host in net.hosts:
        net.restore(host)
    for each in running:
        each.close()


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Layout:
    return LAYOUTS[request.param]


def wait_for(path: Path) -> None:
    deadline_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline_s, "the engine generated nothing"
        time.sleep(0.01)


def run_while(engine: NetEngine, act: Callable[[], None], directory: Path, *, max_tokens: int) -> Any:
    """What rounds of generation return, over and over while `act` runs beside them and a little longer."""
    started, stop = directory / "started", directory / "stop"
    engine.start("generate", prompts=LONG, max_tokens=max_tokens, started=str(started), stop=str(stop))
    wait_for(started)
    act()
    stop.touch()
    return engine.answer()


def test_a_link_cut_and_restored_within_the_limit_costs_time_and_no_token(
    net: Net, opened: Open, layout: Layout, tmp_path: Path
) -> None:
    def cut_and_restore() -> None:
        net.cut("beta")
        time.sleep(CUT_S)
        net.restore("beta")

    found = run_while(opened(layout, timeout_s=25.0), cut_and_restore, tmp_path, max_tokens=24)
    first, *others = found["tokens"]
    assert [len(tokens) for tokens in first] == [24] * len(LONG)
    assert len({tuple(tokens) for tokens in first}) == len(LONG)
    assert all(tokens == first for tokens in others)
    assert sum(each > 0.8 * CUT_S for each in found["times_s"]) == 1  # the round that was under way


def test_a_link_throttled_to_a_tenth_makes_tokens_slower_and_no_other(
    net: Net, opened: Open, layout: Layout, tmp_path: Path
) -> None:
    engine = opened(layout, timeout_s=25.0)
    net.set_rate(layout.rate_mbit)
    found = run_while(engine, lambda: net.set_rate(layout.rate_mbit / 10), tmp_path, max_tokens=2)
    first, *others = found["tokens"]
    assert all(tokens == first for tokens in others)
    assert found["times_s"][-1] > 3 * median(found["times_s"][:3])


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))  # noqa: PTH208


def test_a_link_cut_for_good_ends_every_call_and_the_error_names_both_ends(
    net: Net, opened: Open, layout: Layout, tmp_path: Path
) -> None:
    segments, others = shared_memory(), {*net.pids("alpha"), *net.pids("beta")}
    engine = opened(layout, timeout_s=LIMIT_S)
    started = tmp_path / "started"
    engine.start("fail", prompts=SHORT, max_tokens=100, started=str(started))
    wait_for(started)
    time.sleep(0.5)  # ranks learn of each other what they are called, a moment after they met
    net.cut("beta")
    cut_s = time.monotonic()
    errors = engine.answer()
    # After the limit there are only the reading of what the others said, and their last words to wait for.
    assert LIMIT_S * 0.9 < time.monotonic() - cut_s < 2 * LIMIT_S + 10
    for error in errors:
        assert error["type"] == "RankFailedError"
        # Both ends wait: whichever began first is heard of first, for the engine is told how processes ended anywhere.
        assert re.search(r"on node (alpha|beta) failed: ", error["message"])
        assert re.search(r"(recv|send|all_reduce|all_gather|fused_all_reduce_rms_norm) #\d+ ", error["message"])
        assert "rank 0 of the replica, on alpha" in error["message"]
        assert "rank 1 of the replica, on beta" in error["message"]
    assert [each["type"] for each in engine.ask("fail", prompts=SHORT[:1], max_tokens=1)] == ["RankFailedError"]
    engine.close()
    assert {*net.pids("alpha"), *net.pids("beta")} <= {*others, engine.process.pid}
    assert shared_memory() <= segments


def test_a_call_that_begins_after_the_link_was_cut_ends_with_an_error_too(net: Net, opened: Open) -> None:
    """The first stage only sends: no rank waits for another, and nobody but the engine can notice."""
    engine = opened(LAYOUTS["pipeline"], timeout_s=LIMIT_S / 2)
    net.cut("beta")
    [error] = engine.ask("fail", prompts=SHORT[:1], max_tokens=1)
    assert error["type"] == "RankFailedError"
    assert error["rank"] == 1
    assert "nothing is heard of it from rank 1 (replica 0, stage 1, tensor rank 0) on node beta" in error["message"]
