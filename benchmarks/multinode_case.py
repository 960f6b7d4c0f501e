"""One layout at one rate, measured from the first of its hosts, where the engines run: `multinode.py` starts this."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.multinode_share import Share, planned_steps, run_shares  # noqa: E402
from tests.multinode.net_host import Seats, pin  # noqa: E402
from tests.multinode.netlab import LINK  # noqa: E402

from phalanx.engine.scheduler import Limits  # noqa: E402
from phalanx.launcher.async_engine import AsyncEngine  # noqa: E402
from phalanx.launcher.bench.jobs import scaled  # noqa: E402
from phalanx.launcher.bench.readings import Round  # noqa: E402
from phalanx.launcher.bench.rounds import play, play_round, turned  # noqa: E402
from phalanx.launcher.bench.stages import busy_shares  # noqa: E402
from phalanx.launcher.bench.workloads import RequestShape, workload  # noqa: E402
from phalanx.launcher.config import load_config  # noqa: E402
from phalanx.launcher.schema import CommSection  # noqa: E402
from phalanx.launcher.specs import rank_specs  # noqa: E402
from phalanx.models.resolve import resolve_model  # noqa: E402

MODEL = "smollm2-135m"
OVERLAPS: tuple[str, ...] = get_args(CommSection.model_fields["overlap"].annotation)
SENT = Path(f"/sys/class/net/{LINK}/statistics/tx_bytes")
ALONE = "alone"


class Taken(NamedTuple):
    """A round, and the bytes that left the first host meanwhile."""

    round: Round
    sent_bytes: int


def engine_for(parallel: Mapping[str, Any], overlap: str, seats: Seats, trace: bool) -> AsyncEngine:
    config = load_config(
        {
            "model": MODEL,
            "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": 1.0},
            "parallel": dict(parallel),
            "comm": {"overlap": overlap},
            "engine": {"kv_cache": "256MiB", "prefix_cache": False},
        }
    )
    return AsyncEngine.from_config(config, trace=trace, open_host=seats.open)


def workloads_of(vocab_size: int, scale: float, prefill_tokens: int) -> dict[str, list[RequestShape]]:
    decode = [scaled(shape, scale) for shape in workload("W2", vocab_size=vocab_size)]
    long = (workload("W3", vocab_size=vocab_size)[0].prompt * 2)[:prefill_tokens]
    return {"decode": decode, "prefill": [RequestShape(long, 1)]}


def figures(name: str, requests: Sequence[RequestShape], taken: Sequence[Taken]) -> dict[str, Any]:
    """Medians over rounds; busy: the share of the time in which all stages can have work that each was within steps."""
    tokens = sum(len(shape.prompt) if name == "prefill" else shape.max_tokens for shape in requests)
    last = taken[-1].round
    busy = [shares for each in taken if (shares := busy_shares(each.round.stages[0])) is not None]
    return {
        "tokens_per_s": statistics.median(tokens / each.round.elapsed_s for each in taken),
        "elapsed_s": [each.round.elapsed_s for each in taken],
        "steps": last.steps,
        "stage_busy": [statistics.median(column) for column in zip(*busy, strict=True)] if busy else None,
        "stage_step_ms": [
            1e3 * statistics.mean(step.ended_s - step.started_s for step in steps) for steps in last.stages[0]
        ],
        "sent_mb": statistics.median(each.sent_bytes for each in taken) / 1e6,
        "communication": last.comm[0].to_json(),
    }


async def measure(
    engines: Mapping[str, AsyncEngine], shares: Sequence[Share], case: Mapping[str, Any], limits: Limits
) -> dict[str, Any]:
    vocab_size = next(iter(engines.values())).vocab_size
    found: dict[str, Any] = {}
    for name, requests in workloads_of(vocab_size, case["scale"], case["prefill_tokens"]).items():
        if name not in case["workloads"]:
            continue
        taken: dict[str, list[Taken]] = {overlap: [] for overlap in engines}
        alone_s: list[list[float]] = []
        for engine in engines.values():  # connections, buffers and caches of products are made at the first use
            await play(engine, [shape._replace(prompt=shape.prompt[:32], max_tokens=2) for shape in requests[:8]])
        for number in range(1, case["rounds"] + 1):
            print(f"  {name}, round {number} of {case['rounds']}", file=sys.stderr, flush=True)
            plans = planned_steps([turned(shape, number) for shape in requests], limits)
            alone_s.append(run_shares(shares, plans))
            for overlap, engine in engines.items():
                before = int(SENT.read_text())
                played = await play_round(engine, requests, number, trace=number == case["rounds"])
                taken[overlap].append(Taken(played, int(SENT.read_text()) - before))
        if case["plot"] and name == "decode":
            from phalanx.launcher.trace_plot import plot_runs

            traced = {overlap: all_taken[-1].round.trace for overlap, all_taken in taken.items()}
            runs = [(f"overlap {overlap}, {name}", run) for overlap, run in traced.items() if run is not None]
            plot_runs(case["title"], runs, Path(case["plot"]))
        found[name] = {
            "requests": len(requests),
            "prompt_tokens": sum(len(shape.prompt) for shape in requests),
            "output_tokens": sum(shape.max_tokens for shape in requests),
            ALONE: {"rank_s": [statistics.median(column) for column in zip(*alone_s, strict=True)]},
            **{overlap: figures(name, requests, all_taken) for overlap, all_taken in taken.items()},
        }
    return found


def main() -> None:
    case: dict[str, Any] = json.loads(sys.argv[1])
    seats = Seats.from_json(case["seats"])
    # A core a rank where there are as many; else they share all, as the ranks beside a link do.
    cores = sorted(os.sched_getaffinity(0))
    pinned: list[int] | None = cores if len(seats.hosts) == len(cores) else None
    meeting = tempfile.TemporaryDirectory()
    store = Path(meeting.name, "store")
    shares = [Share(store, None if pinned is None else pinned[rank]) for rank in range(len(seats.hosts))]
    engines: dict[str, AsyncEngine] = {}
    try:
        # Within a stage of one rank there is nothing to choose between.
        for overlap in OVERLAPS if case["parallel"].get("tensor", 1) > 1 else ("auto", "none"):
            print(f"  starts with overlap {overlap}", file=sys.stderr, flush=True)
            engines[overlap] = engine_for(case["parallel"], overlap, seats, bool(case["plot"]))
            if pinned is not None:
                pin([ready.pid for ready in engines[overlap].startup.ranks], pinned)
        first = next(iter(engines.values()))
        source = resolve_model(MODEL)
        for share, spec in zip(
            shares, rank_specs(first.config, first.plan, source.config, source.entries(), 0), strict=True
        ):
            share.load(spec)
        found = asyncio.run(measure(engines, shares, case, first.limits))
        decisions = {
            overlap: {
                each.name: f"{each.choice}: {each.reason}"
                for each in engine.startup.decisions
                if each.name in ("comm", "comm between stages", "overlap")
            }
            for overlap, engine in engines.items()
        }
        dtype = first.plan.dtype
    finally:
        for engine in engines.values():
            engine.close()
        for share in shares:
            share.close()
        meeting.cleanup()
    print(json.dumps({"workloads": found, "decisions": decisions, "dtype": dtype, "pinned": pinned is not None}))


if __name__ == "__main__":
    main()
