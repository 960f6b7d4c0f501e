"""What a rank holds in memory beside its weights and its KV cache, at rest and behind a long prompt.

    python benchmarks/memory.py [--model smollm2-135m] [--prompt 2000] [--json FILE]

Of each rank's process, as Linux counts it (/proc/PID/smaps_rollup): the resident set (RSS), of which file pages and
what is shared with other processes is counted in full, and the proportional set (PSS), where shared pages are divided
by those who share them. Of the KV cache only the pages that were written count; the others are not resident.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from phalanx import SamplingParams
from phalanx.engine.messages import RankReady
from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.bench.report import processor
from phalanx.launcher.config import load_config

MIB = 2**20
LAYOUTS = {"1 rank": 1, "tensor 2": 2}


class Reading(NamedTuple):
    """Of a rank's process, in MiB. kv_used: pages of the KV cache that were written. rest, pss_rest: what RSS and PSS
    are above weights and KV cache.
    """

    layout: str
    rank: int
    when: str
    rss: float
    pss: float
    anonymous: float
    weights: float
    kv_used: float

    @property
    def rest(self) -> float:
        return self.rss - self.weights - self.kv_used

    @property
    def pss_rest(self) -> float:
        return self.pss - self.weights - self.kv_used


def memory_of(pid: int) -> dict[str, float]:
    """In MiB, by Linux's names."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}


def read(layout: str, when: str, ranks: tuple[RankReady, ...], page_tokens: int, num_tokens: int) -> list[Reading]:
    readings = []
    for ready in ranks:
        found = memory_of(ready.pid)
        pages = -(-num_tokens // page_tokens)
        kv_used = ready.kv_bytes / ready.num_pages * pages / MIB
        weights = ready.weight_bytes / MIB
        memory = found["Rss"], found["Pss"], found["Anonymous"]
        readings.append(Reading(layout, ready.rank, when, *memory, weights, kv_used))
    return readings


async def measure(model: str, dtype: str, layout: str, prompt_tokens: int) -> list[Reading]:
    sections: dict[str, Any] = {
        "model": {"path": model, "dtype": dtype},
        "cluster": {"ray": "none", "device": "cpu"},
        "parallel": {"tensor": LAYOUTS[layout]},
        "engine": {"kv_cache": "512MiB"},
    }
    engine = AsyncEngine.from_config(load_config(sections), ranks_apart=True)
    with closing(engine):
        ranks, page_tokens = engine.startup.ranks, engine.plan.page_size
        readings = read(layout, "at rest", ranks, page_tokens, 0)
        num_new = 8
        prompt = [5 + place % 1000 for place in range(prompt_tokens)]
        await engine.generate([prompt], SamplingParams(max_tokens=num_new, ignore_eos=True))
        behind = f"behind {prompt_tokens} tokens"
        return readings + read(layout, behind, ranks, page_tokens, prompt_tokens + num_new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens of the prompt")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    readings = []
    for layout in LAYOUTS:
        readings += asyncio.run(measure(arguments.model, arguments.dtype, layout, arguments.prompt))
    table = Table("MiB", "", "", title=arguments.model, box=None)
    for name in ("weights", "KV", "RSS", "PSS", "anon", "rest, RSS", "PSS"):
        table.add_column(name, justify="right")
    for each in readings:
        figures = (each.weights, each.kv_used, each.rss, each.pss, each.anonymous, each.rest, each.pss_rest)
        table.add_row(each.layout, f"rank {each.rank}", each.when, *(f"{figure:.0f}" for figure in figures))
    Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "memory",
            "command": " ".join(["benchmarks/memory.py", *sys.argv[1:]]),
            "processor": processor(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "model": arguments.model,
            "dtype": arguments.dtype,
            "readings": [
                {
                    **{name: value if isinstance(value, str | int) else round(value, 1) for name, value in row.items()},
                    "rest": round(each.rest, 1),
                    "pss_rest": round(each.pss_rest, 1),
                }
                for each in readings
                for row in [each._asdict()]
            ],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
