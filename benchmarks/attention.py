"""Paged attention of a step against its reference, which loops over the sequences: heads of SmolLM2-135M (9 query heads
over 3 KV heads of 64), pages of 16 tokens, scattered.

    python benchmarks/attention.py [--rounds 9] [--threads N] [--only operator|pages] [--json FILE]

Operator and reference take turns, and the ratio is of their medians. What the plan costs stands beside them: it is made
once a step, the operator runs once a layer.

Pages in 8 bits against pages in bfloat16: decodes at long contexts, over as many caches in turns as leave nothing of
one in the processor's caches when its turn comes again; formats take turns from cache to cache, and ratios are of their
medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table

from phalanx.kernels import (
    KV_DTYPES,
    AttentionPlan,
    group_heads,
    paged_attention,
    paged_attention_reference,
    plan_attention,
    write_kv,
)
from phalanx.launcher.bench.report import processor
from phalanx.models.batch import KVCache
from phalanx.native import resize_pool

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


class PageLoad(NamedTuple):
    """Decodes of so many sequences, each with `context` tokens."""

    sequences: int
    context: int
    queries: int
    keys: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"decode {self.sequences} at {self.context}, {self.queries} over {self.keys} heads of {self.head_dim}"


PAGE_LOADS = (
    PageLoad(1, 4096, 9, 3, 64),
    PageLoad(1, 16384, 9, 3, 64),
    PageLoad(8, 4096, 9, 3, 64),
    PageLoad(1, 4096, 32, 8, 64),
    PageLoad(1, 4096, 32, 8, 128),
)
CACHED_BYTES = 256 * 2**20  # beyond what a processor keeps


def read_pages(load: PageLoad, rounds: int) -> dict[str, float]:
    """Medians of a call by the format of the pages, in µs."""
    pages_each = -(-load.context // PAGE_SIZE)
    num_pages = load.sequences * pages_each
    page_tables = torch.randperm(num_pages).view(load.sequences, pages_each)
    lengths = [load.context] * load.sequences
    plan = plan_attention(page_tables, [1] * load.sequences, lengths, page_size=PAGE_SIZE, window=None, device=CPU)
    heads = group_heads([head * load.keys // load.queries for head in range(load.queries)], load.keys, CPU)
    query = torch.randn(load.sequences, load.queries, load.head_dim).bfloat16()
    cache_bytes = 2 * num_pages * PAGE_SIZE * load.keys * load.head_dim  # of the smaller ones
    num_layers = max(2, -(-CACHED_BYTES // cache_bytes))
    slots = torch.arange(num_pages * PAGE_SIZE)
    caches = {}
    for name in ("auto", *KV_DTYPES):
        shape = (num_layers, num_pages, PAGE_SIZE, load.keys, load.head_dim)
        caches[name] = KVCache(*shape, torch.bfloat16, CPU, name)
        for layer in caches[name]:
            k, v = torch.randn(2, len(slots), load.keys, load.head_dim).bfloat16()
            write_kv(k, v, layer.keys, layer.values, slots, layer.scales)
    taken: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(rounds):
        for layers in zip(*caches.values(), strict=True):
            for name, layer in zip(caches, layers, strict=True):
                started = time.perf_counter()
                paged_attention(query, layer.keys, layer.values, plan, heads, scale=SCALE, kv_scales=layer.scales)
                taken[name].append((time.perf_counter() - started) * 1e6)
    return {name: statistics.median(each) for name, each in taken.items()}


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
    parser.add_argument("--only", choices=("operator", "pages"))
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    resize_pool(arguments.threads)

    readings: dict[str, dict[str, Reading]] = {}
    pages: dict[str, dict[str, float]] = {}
    console = Console(stderr=True)
    for dtype in () if arguments.only == "pages" else (torch.bfloat16, torch.float32):
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
    if arguments.only != "operator":
        columns = [f"{name}, times as fast" for name in KV_DTYPES]
        table = Table(Column("pages", no_wrap=True), "bfloat16 µs", *columns, box=None)
        for page_load in PAGE_LOADS:
            with console.status(page_load.name):
                times = pages[page_load.name] = read_pages(page_load, arguments.rounds)
            ratios = [f"{times['auto'] / times[name]:.2f}" for name in KV_DTYPES]
            table.add_row(page_load.name, f"{times['auto']:.0f}", *ratios)
        Console().print(table)
    if arguments.json is not None:
        report = {
            "benchmark": "attention",
            "command": " ".join(["benchmarks/attention.py", *sys.argv[1:]]),
            "heads": {"query": NUM_QUERY_HEADS, "kv": NUM_KV_HEADS, "head_dim": HEAD_DIM},
            "page_size": PAGE_SIZE,
            "rounds": arguments.rounds,
            "machine": {
                "threads": arguments.threads,
                "processor": processor(),
                "torch": torch.__version__,
            },
            "readings": {
                dtype: {load: reading._asdict() for load, reading in of_dtype.items()}
                for dtype, of_dtype in readings.items()
            },
            "pages_us": pages,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
