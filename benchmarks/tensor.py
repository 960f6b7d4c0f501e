"""What a cut gains on one machine: two ranks of one thread, beside one rank of one and of two threads.

    python benchmarks/tensor.py [--model smollm2-135m] [--rounds 7] [--scale 1.0] [--json FILE]

All engines are up at once and take turns, W1, W2 and two requests of W3, in an order that is reversed from round to
round; an engine that has nothing to do takes no core. Ratios are medians over the rounds of what two ranks gained in
the round.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import write_report  # noqa: E402

from phalanx.launcher.async_engine import AsyncEngine  # noqa: E402
from phalanx.launcher.bench.jobs import scaled  # noqa: E402
from phalanx.launcher.bench.rounds import play, turned  # noqa: E402
from phalanx.launcher.bench.workloads import RequestShape, workload  # noqa: E402
from phalanx.launcher.config import load_config  # noqa: E402

WHOLE: dict[str, int] = {"1 rank, 1 thread": 1, "1 rank, 2 threads": 2}  # threads
CUT: dict[str, dict[str, int]] = {"tensor 2": {"tensor": 2}, "pipeline 2": {"pipeline": 2}}  # of one thread a rank


PROMPTS = 2  # requests of W3


class Reading(NamedTuple):
    """token_s: of W1, the mean time between tokens. tokens_per_s: of W2. prompt_tokens_per_s: of W3's requests."""

    token_s: float
    tokens_per_s: float
    prompt_tokens_per_s: float


def engine_of(
    model: str, dtype: str, threads: int, parallel: dict[str, int], quantization: str = "none"
) -> AsyncEngine:
    sections: dict[str, Any] = {
        "model": {"path": model, "dtype": dtype, "quantization": quantization},
        # Only one can have the cores to itself, and a rank alone gains nothing by it.
        "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": threads, "pin_cores": bool(parallel)},
        "parallel": parallel,
        "engine": {"kv_cache": "512MiB", "max_sequences": 64},
    }
    return AsyncEngine.from_config(load_config(sections), ranks_apart=True)


async def read(
    engine: AsyncEngine, one: Sequence[RequestShape], many: Sequence[RequestShape], prompts: Sequence[RequestShape]
) -> Reading:
    [single] = await play(engine, one)
    token_s = (single.token_s[-1] - single.token_s[0]) / (len(single.token_s) - 1)
    many_s, prompts_s = await took_s(engine, many), await took_s(engine, prompts)
    return Reading(
        token_s,
        sum(shape.max_tokens for shape in many) / many_s,
        sum(len(shape.prompt) for shape in prompts) / prompts_s,
    )


async def took_s(engine: AsyncEngine, shapes: Sequence[RequestShape]) -> float:
    began_s = time.perf_counter()
    await play(engine, shapes)
    return time.perf_counter() - began_s


async def measure(
    engines: dict[str, AsyncEngine], rounds: int, scale: float, console: Console
) -> dict[str, list[Reading]]:
    found: dict[str, list[Reading]] = {name: [] for name in engines}
    for number in range(rounds + 1):  # the first warms up
        for name in list(engines)[:: -1 if number % 2 else 1]:
            engine = engines[name]
            shapes = [
                [scaled(turned(shape, number), scale) for shape in workload(which, vocab_size=engine.vocab_size)]
                for which in ("W1", "W2", "W3")
            ]
            shapes[-1] = shapes[-1][:PROMPTS]
            found[name].append(await read(engine, *shapes))
        words = ", ".join(
            f"{1e3 * token_s:.1f} ms {tokens_per_s:.0f}/s {prompt_tokens_per_s:.0f}/s"
            for token_s, tokens_per_s, prompt_tokens_per_s in (taken[-1] for taken in found.values())
        )
        console.print(f"round {number}: {words}")
    return {name: taken[1:] for name, taken in found.items()}


def gain(cut: Sequence[Reading], whole: Sequence[Reading]) -> Reading:
    """How many times faster."""
    pairs = list(zip(cut, whole, strict=True))
    return Reading(
        statistics.median(other.token_s / ours.token_s for ours, other in pairs),
        statistics.median(ours.tokens_per_s / other.tokens_per_s for ours, other in pairs),
        statistics.median(ours.prompt_tokens_per_s / other.prompt_tokens_per_s for ours, other in pairs),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.0, help="times all lengths of the workloads in tokens")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with ExitStack() as closes:
        engines = {
            name: closes.enter_context(closing(engine_of(arguments.model, arguments.dtype, threads, parallel)))
            for name, threads, parallel in (
                *((name, threads, {}) for name, threads in WHOLE.items()),
                *((name, 1, parallel) for name, parallel in CUT.items()),
            )
        }
        found = asyncio.run(measure(engines, arguments.rounds, arguments.scale, Console(stderr=True)))
    gains = {cut: {whole: gain(found[cut], found[whole]) for whole in WHOLE} for cut in CUT}
    table = Table(
        "medians",
        "W1, ms a token",
        "W2, tokens/s",
        "W3, prompt tokens/s",
        *(f"against {whole}: W1, W2, W3" for whole in WHOLE),
        box=None,
    )
    for name, taken in found.items():
        table.add_row(
            name,
            f"{1e3 * statistics.median(each.token_s for each in taken):.1f}",
            f"{statistics.median(each.tokens_per_s for each in taken):.0f}",
            f"{statistics.median(each.prompt_tokens_per_s for each in taken):.0f}",
            *(", ".join(f"x {times:.2f}" for times in each) for each in gains.get(name, {}).values()),
        )
    Console().print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "tensor",
            model=arguments.model,
            dtype=arguments.dtype,
            gains={cut: {whole: each._asdict() for whole, each in row.items()} for cut, row in gains.items()},
            rounds={name: [each._asdict() for each in taken] for name, taken in found.items()},
        )


if __name__ == "__main__":
    main()
