"""Hundreds of clients at once for minutes: whether a server loses, mixes up, leaks or blocks anything.

    python benchmarks/soak.py [--streams 500] [--minutes 5] [--config FILE] [--json FILE]
    python benchmarks/soak.py --url http://localhost:8000

Without --url it starts `phalanx serve`: on --config, or on one rank of a tiny model, which it makes (transformers is
needed for that). The clients (tests/serve/population.py) follow streams and compare every token with what the same
request was answered when it was alone, leave midway or before the first token, read slowly or not at all, send requests
in a pipeline, parts of requests, and requests that are wrong or a lot of work to read: prompts of a megabyte, chats of
thousands of messages.

Beside them a process of its own asks for /health twenty times a second (tests/serve/prober.py), over a connection that
it keeps and over fresh ones; what falls due while an answer is waited for counts too. The same questions to a process
that does nothing else (`bare`) say what the machine adds, whose cores the clients and the ranks share with the server.

At the end nothing may be left: no sequence, no page in use, no connection, no thread; and no memory that goes on
growing, whose slope is taken over the second half. With --url only what the server says of itself is known.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # what the clients do is shared with a test

from tests.serve import prober  # noqa: E402
from tests.serve.bad_requests import bad_requests  # noqa: E402
from tests.serve.mixed_requests import mixed_requests  # noqa: E402
from tests.serve.population import Known, Population, Tally  # noqa: E402
from tests.serve.soak_model import LONG_TEXT, soak_sections  # noqa: E402
from tests.serve.streams import Asked, ask  # noqa: E402

from phalanx.launcher.bench.report import processor  # noqa: E402

NUM_REQUESTS = 48  # that differ
MAX_TOKENS = 64
MAX_BODY = 4 * 2**20  # the default of serve.max_body
HEALTH_LIMIT_S = 0.1
START_S = 300.0
SETTLE_S = 60.0  # for what clients left behind to be noticed
SAMPLE_S = 1.0
NOW = ("running", "waiting", "pages_used")


class Sample(NamedTuple):
    """The server's process at a moment, in seconds since the start; None where it is not ours to look into."""

    at_s: float
    running: int
    waiting: int
    pages_used: int
    rss_bytes: int | None
    ranks_rss_bytes: int | None
    threads: int | None
    descriptors: int | None


class Watch:
    """Looks at a server from outside."""

    def __init__(self, session: aiohttp.ClientSession, process: psutil.Process | None) -> None:
        self.samples: list[Sample] = []
        self._session = session
        self._process = process
        self._began_s = time.monotonic()

    async def look(self) -> Sample:
        async with self._session.get("/status") as response:
            replicas = (await response.json())["replicas"]
        sums = [sum(replica[name] for replica in replicas) for name in NOW]
        inside: tuple[int | None, ...] = (None,) * 4
        if self._process is not None:
            children = self._process.children(recursive=True)
            ranks_bytes = sum(child.memory_info().rss for child in children)
            process = self._process
            inside = process.memory_info().rss, ranks_bytes, process.num_threads(), process.num_fds()
        return Sample(time.monotonic() - self._began_s, *sums, *inside)

    async def follow(self) -> None:
        while True:
            self.samples.append(await self.look())
            await asyncio.sleep(SAMPLE_S)

    async def settled(self, before: Sample) -> Sample:
        """The state once nothing is left, or what is left after `SETTLE_S`."""
        until_s = time.monotonic() + SETTLE_S
        while left_behind(before, sample := await self.look()) and time.monotonic() < until_s:
            await asyncio.sleep(0.5)
        return sample


def left_behind(before: Sample, after: Sample) -> list[str]:
    """What there is more of than at the start, in words."""
    found = [f"{name}: {getattr(after, name)}" for name in NOW if getattr(after, name)]
    for name in ("threads", "descriptors"):
        was, now = getattr(before, name), getattr(after, name)
        if was is not None and now > was:
            found.append(f"{name}: {now}, {was} at the start")
    return found


class Soaked(NamedTuple):
    """What came of it. before, after: the server without clients."""

    tally: Tally
    health: list[dict[str, Any]]
    samples: list[Sample]
    before: Sample
    after: Sample
    elapsed_s: float


async def soak(url: str, process: psutil.Process | None, num_streams: int, seconds: float, seed: int) -> Soaked:
    async with aiohttp.ClientSession(url) as session:
        bad = bad_requests(long_text=LONG_TEXT, max_body=MAX_BODY)
        known = []
        for path, body in mixed_requests(NUM_REQUESTS, max_tokens=MAX_TOKENS, seed=seed):
            asked = Asked(path, {**body, "return_token_ids": True})
            known.append(Known(asked, await ask(session, asked)))
        async with Population(url, known, bad, seed=seed) as clients:
            # So that all that is made at the first use is there.
            await asyncio.gather(*[clients.err(each) for each in bad])
        watch = Watch(session, process)
        before = await watch.look()
        with probing(url) as health:
            following = asyncio.create_task(watch.follow())
            began_s = time.monotonic()
            async with Population(url, known, bad, seed=seed + 1) as clients:
                await clients.live(num_streams, seconds)
            elapsed_s = time.monotonic() - began_s
            following.cancel()
        after = await watch.settled(before)
    return Soaked(clients.tally, health, watch.samples, before, after, elapsed_s)


@contextmanager
def probing(url: str) -> Iterator[list[dict[str, Any]]]:
    """Asks for /health from another process; the list has what came of it once the context has ended."""
    found: list[dict[str, Any]] = []
    command = [sys.executable, prober.__file__, prober.BARE, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield found
        answer, _ = process.communicate()
        found += json.loads(answer)


@contextmanager
def serving(config: Path | None, log: Path, folder: Path, num_streams: int) -> Iterator[tuple[str, psutil.Process]]:
    """A server of its own, and where it is reached."""
    if config is None:
        config = folder / "soak.yaml"
        made = soak_sections(
            folder / "model",
            max_sequences=num_streams + 12,
            kv_cache=f"{max(8, num_streams // 4)}MiB",
            stalled_client_s=5.0,
        )
        config.write_text(yaml.safe_dump(made))
    program = str(Path(sys.executable).with_name("phalanx"))
    command = [program, "serve", str(config), "--host", "127.0.0.1", "--port", "0"]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield _url_in(log, process), psutil.Process(process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(SETTLE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _url_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    until_s = time.monotonic() + START_S
    while time.monotonic() < until_s and process.poll() is None:
        _, found, rest = log.read_text().partition(" at http://")
        if found and "\n" in rest:
            return "http://" + rest.split()[0]
        time.sleep(0.1)
    sys.exit(f"the server did not start:\n{log.read_text()[-4000:]}")


def refusals_in(log: Path) -> tuple[Counter[str], list[str]]:
    """What the access log says was refused, and how often; and the lines that are none of its."""
    counts: Counter[str] = Counter()
    others = []
    _, _, lines = log.read_text(errors="replace").partition(" at http://")  # what is before tells of the start
    for line in lines.splitlines()[1:]:
        try:
            entry = json.loads(line)
        except ValueError:
            others.append(line)
            continue
        counts[entry.get("refusal") or ("disconnected" if entry.get("disconnected") else "served")] += 1
    return counts, others


def quantiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values_s)
    at = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
    return {name: 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in at.items()}


def growth_mib_per_min(samples: Sequence[Sample]) -> float | None:
    """Of the server's memory over the second half."""
    half = [sample for sample in samples[len(samples) // 2 :] if sample.rss_bytes is not None]
    if len(half) < 2:
        return None
    times, sizes = [sample.at_s / 60 for sample in half], [(sample.rss_bytes or 0) / 2**20 for sample in half]
    return statistics.linear_regression(times, sizes).slope


def health_report(probes: dict[str, Any]) -> dict[str, Any]:
    """Of one way of asking."""
    latencies = probes["latencies_s"]
    return {
        "connection": "kept" if probes["keeps"] else "fresh",
        "probes": len(latencies),
        "latency_ms": quantiles_ms(latencies),
        "over_limit": sum(latency > HEALTH_LIMIT_S for latency in latencies),
        "failed": len(probes["problems"]),
        "woke_late_ms": quantiles_ms(probes["lags_s"] or [0.0]),
    }


def report(soaked: Soaked, arguments: argparse.Namespace, log: Path | None) -> dict[str, Any]:
    refusals, others = refusals_in(log) if log else (Counter[str](), [])
    names = ["bare", "kept", "fresh"]
    tally = soaked.tally
    return {
        "benchmark": "soak",
        "command": f"benchmarks/soak.py --streams {arguments.streams} --minutes {arguments.minutes:g}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": arguments.config.name if arguments.config else "a tiny model, one rank",
        "machine": {"processor": processor(), "num_cores": os.cpu_count(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("phalanx", "torch", "uvicorn", "fastapi", "aiohttp")},
        "elapsed_s": soaked.elapsed_s,
        "deeds": dict(tally.done),
        "tokens_compared": tally.tokens,
        "refused_for_now": tally.busy,
        "problems": tally.problems,
        "left_behind": left_behind(soaked.before, soaked.after),
        "access_log": dict(refusals),
        "other_log_lines": others[:100],
        "health": {name: health_report(probes) for name, probes in zip(names, soaked.health, strict=True)},
        "health_limit_ms": 1e3 * HEALTH_LIMIT_S,
        "growth_mib_per_min": growth_mib_per_min(soaked.samples),
        "before": soaked.before._asdict(),
        "after": soaked.after._asdict(),
        "samples": [sample._asdict() for sample in soaked.samples],
    }


def show(told: dict[str, Any], console: Console) -> None:
    deeds = Table("deed", "times", box=None)
    for name, times in sorted(told["deeds"].items(), key=lambda item: -item[1]):
        deeds.add_row(name.replace("_", " "), str(times))
    console.print(deeds, "")
    health = Table("/health", "probes", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "over 100 ms", "failed", box=None)
    for name, each in told["health"].items():
        figures = [f"{value:.1f}" for value in each["latency_ms"].values()]
        health.add_row(name, str(each["probes"]), *figures, str(each["over_limit"]), str(each["failed"]))
    console.print(health, "")
    samples = told["samples"]
    most = {name: max(sample[name] for sample in samples) for name in NOW}
    console.print(f"at once, at most: {most['running']} running, {most['waiting']} waiting; {most['pages_used']} pages")
    console.print(
        f"{told['tokens_compared']} tokens compared, {told['refused_for_now']} requests refused for now (429)"
    )
    if told["growth_mib_per_min"] is not None:
        first, last = told["before"], told["after"]
        console.print(
            f"memory: {first['rss_bytes'] / 2**20:.0f} MiB before, {last['rss_bytes'] / 2**20:.0f} MiB after, "
            f"{told['growth_mib_per_min']:+.2f} MiB a minute over the second half"
        )
        console.print(
            f"descriptors: {first['descriptors']} before, {last['descriptors']} after; "
            f"threads: {first['threads']} before, {last['threads']} after"
        )
    for name in ("problems", "left_behind", "other_log_lines"):
        found = told[name]
        console.print(f"{name.replace('_', ' ')}: {len(found) or 'none'}")
        for each in found[:10]:
            console.print(f"  {each}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500, help="clients at once")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--config", type=Path, metavar="FILE", help="serve this, and not a tiny model")
    where.add_argument("--url", help="a server that runs")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    seconds = 60 * arguments.minutes

    with tempfile.TemporaryDirectory() as folder:
        if arguments.url:
            log = None
            soaked = asyncio.run(soak(arguments.url, None, arguments.streams, seconds, arguments.seed))
        else:
            log = arguments.log or Path(folder) / "log"
            with serving(arguments.config, log, Path(folder), arguments.streams) as (url, process):
                soaked = asyncio.run(soak(url, process, arguments.streams, seconds, arguments.seed))
        told = report(soaked, arguments, log)
    show(told, console)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(told, indent=1) + "\n")
    if told["problems"] or told["left_behind"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
