"""Paged attention of a step against its reference, which loops over the sequences: heads of SmolLM2-135M (9 query heads
over 3 KV heads of 64), pages of 16 tokens, scattered.

    python benchmarks/attention.py [--rounds 9] [--threads N] [--json FILE]

Operator and reference take turns, and the ratio is of their medians. What the plan costs stands beside them: it is made
once a step, the operator runs once a layer.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table

from phalanx.kernels import AttentionPlan, group_heads, paged_attention, paged_attention_reference, plan_attention

NUM_QUERY_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE = 9, 3, 64, 16
SCALE = HEAD_DIM**-0.5
CPU = torch.device("cpu")


class Load(NamedTuple):
    """new: tokens of each sequence in the step. contexts: all of its tokens, new ones included."""

    name: str
    new: list[int]
    contexts: list[int]


class Reading(NamedTuple):
    """Medians, in µs."""

    operator_us: float
    reference_us: float
    plan_us: float


def loads() -> list[Load]:
    generator = torch.Generator().manual_seed(0)

    def around(mean: int, count: int) -> list[int]:
        """Uniform in half to one and a half times the mean, for sequences of a batch are never equally long."""
        return torch.randint(mean // 2, mean * 3 // 2, (count,), generator=generator).tolist()

    decodes = [
        Load(f"decode {count} at {context}", [1] * count, around(context, count) if count > 1 else [context])
        for count in (1, 8, 32, 128)
        for context in (64, 256, 1024)
    ]
    return [
        *decodes,
        Load("decode 31 at 200, 1 at 8000", [1] * 32, [8000] + [200] * 31),
        Load("prefill 1 x 512", [512], [512]),
        Load("prefill 8 x 64", [64] * 8, [64] * 8),
        Load("chunks 8 x 16 at 256", [16] * 8, [256] * 8),
        Load("chunk 256 at 8192", [256], [8192]),
        Load("decode 16 at 256, chunk 256 at 1024", [1] * 16 + [256], [*around(256, 16), 1024]),
    ]


def medians_us(calls: list[Callable[[], object]], rounds: int) -> list[float]:
    """Every call once a round, so that a machine whose speed drifts treats them alike."""
    readings: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, taken in zip(calls, readings, strict=True):
            started = time.perf_counter()
            call()
            if number > 0:  # the first warms up
                taken.append((time.perf_counter() - started) * 1e6)
    return [statistics.median(taken) for taken in readings]


def read(load: Load, dtype: torch.dtype, rounds: int) -> Reading:
    num_pages = [-(-context // PAGE_SIZE) for context in load.contexts]
    scattered = torch.split(torch.randperm(sum(num_pages)), num_pages)
    page_tables = torch.nn.utils.rnn.pad_sequence(list(scattered), batch_first=True)
    shape = (sum(num_pages), PAGE_SIZE, NUM_KV_HEADS, HEAD_DIM)
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    query = torch.randn(sum(load.new), NUM_QUERY_HEADS, HEAD_DIM).to(dtype)
    kv_of_query = [head * NUM_KV_HEADS // NUM_QUERY_HEADS for head in range(NUM_QUERY_HEADS)]
    kv_index = torch.tensor(kv_of_query)
    heads = group_heads(kv_of_query, NUM_KV_HEADS, CPU)

    def make_plan() -> AttentionPlan:
        return plan_attention(page_tables, load.new, load.contexts, page_size=PAGE_SIZE, window=None, device=CPU)

    plan = make_plan()
    return Reading(
        *medians_us(
            [
                lambda: paged_attention(query, keys, values, plan, heads, scale=SCALE),
                lambda: paged_attention_reference(
                    query, keys, values, page_tables, load.new, load.contexts, kv_index, scale=SCALE
                ),
                make_plan,
            ],
            rounds,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1, help="more only on an idle machine: they wait for each other")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    readings: dict[str, dict[str, Reading]] = {}
    console = Console(stderr=True)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        readings[name] = {}
        table = Table(Column("load", no_wrap=True), "operator µs", "reference µs", "ratio", "plan µs", box=None)
        for load in loads():
            with console.status(f"{name}: {load.name}"):
                reading = readings[name][load.name] = read(load, dtype, arguments.rounds)
            table.add_row(
                load.name,
                f"{reading.operator_us:.0f}",
                f"{reading.reference_us:.0f}",
                f"{reading.reference_us / reading.operator_us:.1f}",
                f"{reading.plan_us:.0f}",
            )
        Console().print(name, table, "")
    if arguments.json is not None:
        report = {
            "benchmark": "attention",
            "command": f"benchmarks/attention.py --rounds {arguments.rounds} --threads {arguments.threads}",
            "heads": {"query": NUM_QUERY_HEADS, "kv": NUM_KV_HEADS, "head_dim": HEAD_DIM},
            "page_size": PAGE_SIZE,
            "rounds": arguments.rounds,
            "machine": {
                "threads": arguments.threads,
                "processor": platform.machine(),
                "torch": torch.__version__,
            },
            "readings": {
                dtype: {load: reading._asdict() for load, reading in of_dtype.items()}
                for dtype, of_dtype in readings.items()
            },
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
