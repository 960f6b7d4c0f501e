"""The native operators of CPUs beside PyTorch's, in the shapes of a decode step and of prefill.

    python benchmarks/cpu_operators.py [--rounds 9] [--threads 2] [--model smollm2-135m] [--json FILE]

Both take turns, and the ratio is of their medians. `limit` is what the operator may take at least: its bytes at the
bandwidth of reading memory, its products at the rate of bfloat16 products, both measured in the same run, whichever
takes longer; what lies in a cache may be faster. Inputs differ from call to call, and together exceed the caches where
they would in a model of many layers.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from phalanx.kernels import (
    AttentionPlan,
    add_rms_norm,
    argmax,
    group_heads,
    native_cpu,
    paged_attention,
    plan_attention,
    rms_norm,
    rope_and_write_kv,
    rope_frequencies,
    rope_table,
    silu_mul,
    top,
)
from phalanx.launcher.bench.report import processor
from phalanx.launcher.machine import this_machine
from phalanx.native import find_native, resize_pool

CPU = torch.device("cpu")
PAGE_SIZE = 16
EPS = 1e-5
PAUSE_S = 0.01  # the threads of the one spin for some time after their work, before they leave the cores to the other
LAYERS = 8  # caches and activations that calls take in turns
TOP = 50


class Model(NamedTuple):
    """hidden, ffn: sizes. queries, keys: numbers of heads. head_dim. vocab: rows."""

    hidden: int
    queries: int
    keys: int
    head_dim: int
    ffn: int
    vocab: int


MODELS = {
    "smollm2-135m": Model(576, 9, 3, 64, 1536, 49152),
    "1b": Model(2048, 32, 8, 64, 8192, 49152),
}


class Load(NamedTuple):
    """new: tokens of each sequence in the step. contexts: all of its tokens, new ones included."""

    name: str
    new: list[int]
    contexts: list[int]


LOADS = (
    Load("decode 1 at 256", [1], [256]),
    Load("decode 1 at 4096", [1], [4096]),
    Load("decode 32 at 256", [1] * 32, [129 + 8 * i for i in range(32)]),
    Load("prefill 512", [512], [512]),
    Load("prefill 1024", [1024], [1024]),
    Load("prefill 2048", [2048], [2048]),
    Load("chunk 256 at 4096", [256], [4096]),
    Load("decode 16, chunk 128 at 512", [1] * 16 + [128], [129 + 8 * i for i in range(16)] + [512]),
)


class Case(NamedTuple):
    """One operator in one shape. call: with the number of a layer. num_bytes, num_products: the least to be done."""

    operator: str
    load: str
    call: Callable[[int], object]
    num_bytes: float
    num_products: float = 0.0


class Reading(NamedTuple):
    """Medians, in µs."""

    native_us: float
    torch_us: float
    limit_us: float


def cases(model: Model, dtype: torch.dtype) -> Iterator[Case]:
    for rows in (1, 32, 512, 2048):
        yield from row_cases(model, dtype, rows)
    for rows in (1, 32):
        yield from search_cases(model, rows)
    for load in LOADS:
        yield from attention_cases(model, dtype, load)


def row_cases(model: Model, dtype: torch.dtype, rows: int) -> Iterator[Case]:
    load = f"{rows} rows"
    weight = torch.randn(model.hidden).to(dtype)
    x, residual = torch.randn(2, LAYERS, rows, model.hidden).to(dtype)
    gate_up = torch.randn(LAYERS, rows, 2 * model.ffn).to(dtype)
    qkv = torch.randn(LAYERS, rows, (model.queries + 2 * model.keys) * model.head_dim).to(dtype)
    cache = torch.zeros(2, LAYERS, rows // PAGE_SIZE + 1, PAGE_SIZE, model.keys, model.head_dim, dtype=dtype)
    table = rope_table(torch.arange(rows), rope_frequencies(model.head_dim, 10000.0), dtype)
    slots = torch.randperm(cache.shape[2] * PAGE_SIZE)[:rows]

    def rotate(layer: int) -> object:
        return rope_and_write_kv(qkv[layer], table, cache[0, layer], cache[1, layer], slots)

    yield Case("rms_norm", load, lambda layer: rms_norm(x[layer], weight, EPS), 2 * x[0].nbytes)
    yield Case(
        "add_rms_norm", load, lambda layer: add_rms_norm(x[layer], residual[layer], weight, EPS), 4 * x[0].nbytes
    )
    yield Case("silu_mul", load, lambda layer: silu_mul(gate_up[layer]), 1.5 * gate_up[0].nbytes)
    yield Case("rope_and_write_kv", load, rotate, 2 * qkv[0].nbytes)


def search_cases(model: Model, rows: int) -> Iterator[Case]:
    logits = torch.randn(2, rows, model.vocab)
    yield Case("argmax", f"{rows} rows", lambda layer: argmax(logits[layer % 2]), logits[0].nbytes)
    yield Case(f"top {TOP}", f"{rows} rows", lambda layer: top(logits[layer % 2], TOP), logits[0].nbytes)


def attention_cases(model: Model, dtype: torch.dtype, load: Load) -> Iterator[Case]:
    heads = group_heads([head * model.keys // model.queries for head in range(model.queries)], model.keys, CPU)
    num_pages = [-(-context // PAGE_SIZE) for context in load.contexts]
    scattered = torch.split(torch.randperm(sum(num_pages)), num_pages)
    tables = torch.nn.utils.rnn.pad_sequence(list(scattered), batch_first=True)
    cache = torch.randn(2, LAYERS, sum(num_pages), PAGE_SIZE, model.keys, model.head_dim).to(dtype)
    query = torch.randn(LAYERS, sum(load.new), model.queries, model.head_dim).to(dtype)
    plans: dict[bool, AttentionPlan] = {}

    def plan(_: int = 0) -> AttentionPlan:
        return plan_attention(tables, load.new, load.contexts, page_size=PAGE_SIZE, window=None, device=CPU)

    def attend(layer: int) -> object:
        native = native_cpu.LIBRARY is not None
        if native not in plans:
            plans[native] = plan()
        return paged_attention(
            query[layer], cache[0, layer], cache[1, layer], plans[native], heads, scale=model.head_dim**-0.5
        )

    pairs = sum(
        new * (context - new) + new * (new + 1) // 2 for new, context in zip(load.new, load.contexts, strict=True)
    )
    moved = 2 * (sum(load.contexts) * model.keys + sum(load.new) * model.queries) * model.head_dim * dtype.itemsize
    yield Case("paged_attention", load.name, attend, moved, 4.0 * pairs * model.queries * model.head_dim)
    yield Case("plan_attention", load.name, plan, 0.0)


def read(case: Case, rounds: int, least_s: float = 0.005) -> tuple[float, float]:
    """Medians of native and torch, in µs a call, each round as many calls as fill `least_s`."""
    library = native_cpu.LIBRARY
    readings: dict[bool, list[float]] = {True: [], False: []}
    repeats = {True: 1, False: 1}
    try:
        for number in range(rounds + 2):
            for native in (True, False) if number % 2 else (False, True):
                native_cpu.LIBRARY = library if native else None
                time.sleep(PAUSE_S)
                started_s = time.perf_counter()
                for call in range(repeats[native]):
                    case.call(call % LAYERS)
                taken_s = (time.perf_counter() - started_s) / repeats[native]
                if number < 2:  # warms up, then finds how many calls
                    repeats[native] = max(1, min(LAYERS * 200, int(least_s / taken_s)))
                else:
                    readings[native].append(1e6 * taken_s)
    finally:
        native_cpu.LIBRARY = library
    return statistics.median(readings[True]), statistics.median(readings[False])


def bandwidth() -> float:
    """Of reading memory, bytes a second: the largest of several sums over 256 MiB."""
    x = torch.ones(2**25, dtype=torch.float64)
    taken_s = []
    for _ in range(5):
        started_s = time.perf_counter()
        x.sum()
        taken_s.append(time.perf_counter() - started_s)
    return x.nbytes / min(taken_s)


def product_rate(dtype: torch.dtype) -> float:
    """Of a large matrix product, operations a second."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    taken_s = []
    for _ in range(8):
        started_s = time.perf_counter()
        a @ b
        taken_s.append(time.perf_counter() - started_s)
    return float(2 * 1024**3 / min(taken_s))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--model", action="append", choices=list(MODELS), help="one of these alone; may be repeated")
    parser.add_argument("--operator", help="those alone whose name begins so")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if native_cpu.LIBRARY is None:
        sys.exit(f"nothing to compare: {find_native().told}")
    torch.set_num_threads(arguments.threads)
    resize_pool(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    bytes_per_s, products_per_s = bandwidth(), product_rate(dtype)
    found: dict[str, dict[str, Reading]] = {}
    console = Console()
    console.print(
        f"{arguments.threads} threads, {arguments.dtype}: reads {bytes_per_s / 1e9:.1f} GB/s, "
        f"multiplies {products_per_s / 1e9:.0f} GFLOP/s"
    )
    for name in arguments.model or MODELS:
        table = Table(name, "load", "native µs", "torch µs", "torch / native", "limit µs", "native / limit", box=None)
        found[name] = {}
        with torch.inference_mode():
            for case in cases(MODELS[name], dtype):
                if not case.operator.startswith(arguments.operator or ""):
                    continue
                native_us, torch_us = read(case, arguments.rounds)
                limit_us = 1e6 * max(case.num_bytes / bytes_per_s, case.num_products / products_per_s)
                found[name][f"{case.operator}, {case.load}"] = Reading(native_us, torch_us, limit_us)
                table.add_row(
                    case.operator,
                    case.load,
                    f"{native_us:.1f}",
                    f"{torch_us:.1f}",
                    f"{torch_us / native_us:.1f}",
                    f"{limit_us:.1f}",
                    f"{native_us / limit_us:.1f}" if limit_us else "",
                )
        console.print(table, "")
    if arguments.json is not None:
        report = {
            "benchmark": "cpu_operators",
            "command": " ".join(["benchmarks/cpu_operators.py", *sys.argv[1:]]),
            "processor": processor(),
            "cores": this_machine().num_cores,
            "native": find_native().told,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "threads": arguments.threads,
            "dtype": arguments.dtype,
            "bytes_per_s": bytes_per_s,
            "products_per_s": products_per_s,
            "readings": {
                model: {case: reading._asdict() for case, reading in of_model.items()}
                for model, of_model in found.items()
            },
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
