"""What the ledger of transfers takes of a decode step: the writing of it, and the ranks' reports.

    python benchmarks/ledger.py [--model smollm2-135m] [--tensor 2] [--tokens 256] [--rounds 5] [--json FILE]

A step with the ledger and one without it are alike to within their own noise. So the step of a run is timed and its
operations are counted, and beside that both parts are measured by themselves: the entries of a step, written in a row
as behind a replayed one, with the processor's caches emptied before; and the sums of half a second with their message
to the engine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import write_report  # noqa: E402

from phalanx import LLM, SamplingParams  # noqa: E402
from phalanx.comm.ledger import Ledger  # noqa: E402
from phalanx.engine.messages import CommReport  # noqa: E402
from phalanx.engine.step_loop import MOST_REPORTED_S  # noqa: E402
from phalanx.launcher.config import load_config  # noqa: E402
from phalanx.launcher.generate_output import await_reports  # noqa: E402

CACHES_BYTES = 256 << 20
NUM_STEPS = 100


def read_step(llm: LLM, num_tokens: int) -> tuple[float, float, int]:
    """Seconds and operations of a step, on a rank in the mean; and the kinds of sums that a report has."""
    before, steps = _num_ops(llm), llm.replica_stats()[0].steps
    began_s = time.perf_counter()
    llm.generate("The quick brown fox", SamplingParams(max_tokens=num_tokens, ignore_eos=True))
    taken_s = time.perf_counter() - began_s
    num_steps = llm.replica_stats()[0].steps - steps
    num_ops = (_num_ops(llm) - before) / num_steps
    return taken_s / num_steps, num_ops, max(map(len, llm.comm_totals()[0].values()))


def _num_ops(llm: LLM) -> float:
    assert await_reports(llm)
    ranks = llm.comm_totals()[0].values()
    return sum(each.num_ops for mine in ranks for each in mine) / max(1, len(ranks))


def entries_s(num_ops: int) -> float:
    """Of the entries of a step."""
    ledger, caches = Ledger(), torch.zeros(CACHES_BYTES, dtype=torch.uint8)
    taken_s = []
    for step in range(NUM_STEPS):
        caches.add_(1)
        began_s = time.perf_counter()
        for seq in range(num_ops):
            ledger.record(seq, "stage0", "all_reduce", 1152, began_s, 1e-6, began_s + 1e-6, -1, 1, (step, seq))
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s)


def report_s(num_entries: int, num_kinds: int) -> float:
    """Of one report of so many operations in so many kinds."""
    ledger, encoder = Ledger(), msgspec.msgpack.Encoder()
    taken_s = []
    for _ in range(20):
        for number in range(num_entries):
            ledger.layer = number % num_kinds
            ledger.record(number, "stage0", "all_reduce", 1152, 0.0, 1e-6, 1e-6, -1, 1)
        began_s = time.perf_counter()
        taken = ledger.take()
        encoder.encode(CommReport(0, 0, taken.totals, taken.late))
        taken_s.append(time.perf_counter() - began_s)
    return statistics.median(taken_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    config = {
        "model": {"path": arguments.model, "dtype": "bfloat16"},
        "cluster": {"ray": "none", "device": "cpu", "cpus_per_rank": 1},
        "parallel": {"tensor": arguments.tensor},
        "engine": {"kv_cache": "256MiB"},
    }
    with LLM.from_config(load_config(config)) as llm:
        read_step(llm, arguments.tokens)  # warms up
        readings = [read_step(llm, arguments.tokens) for _ in range(arguments.rounds)]
    step_s, num_ops = (statistics.median(values) for values in list(zip(*readings, strict=True))[:2])
    steps_a_report = MOST_REPORTED_S / step_s
    written_s = entries_s(round(num_ops))
    reports_s = report_s(round(num_ops * steps_a_report), readings[0][2]) / steps_a_report
    found = {
        "step_us": step_s * 1e6,
        "operations": num_ops,
        "entries_us": written_s * 1e6,
        "reports_us": reports_s * 1e6,
        "share": (written_s + reports_s) / step_s,
    }
    table = Table(box=None)
    for name in found:
        table.add_column(name.replace("_us", ", us"), justify="right")
    table.add_row(*(f"{value:.2%}" if name == "share" else f"{value:,.1f}" for name, value in found.items()))
    Console(width=120).print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "ledger",
            model=arguments.model,
            tensor=arguments.tensor,
            of_a_step=found,
        )


if __name__ == "__main__":
    main()
