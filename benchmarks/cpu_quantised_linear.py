"""Products from quantised weights on this CPU, beside those in bfloat16 and what memory allows.

    python benchmarks/cpu_quantised_linear.py [--rows 1,8,64,256,1024] [--shapes 4096x4096] [--threads 2] [--rounds 9]
        [--json FILE]

A shape is outputs x inputs. Each weight is there as many times as the caches cannot hold, and every product takes the
next one, as the layers of a model do. All forms of it and a plain read of memory take turns; figures are medians of a
round's readings. A form's bytes are all that it holds: integers, scales, offsets.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cpu_linear import CACHED_BYTES, QUIET_S, ROUND_S, integers, seconds, shapes  # noqa: E402
from benchmarks.report import write_report  # noqa: E402

from phalanx.kernels import Weight, linear, make_packed  # noqa: E402
from phalanx.kernels.quantise import quantise  # noqa: E402
from phalanx.kernels.quantised_weight import QuantisedWeight, WeightFormat  # noqa: E402
from phalanx.native import find_native, resize_pool  # noqa: E402

FORMATS = {
    "int8": WeightFormat(8),
    "int8, groups of 32 (Q8_0)": WeightFormat(8, 32, torch.float16),
    "w8a8": WeightFormat(8, activations=True),
    "int4, groups of 32": WeightFormat(4, 32, torch.float16, offsets=True),
    "int4, groups of 128 with zeros (AWQ)": WeightFormat(4, 128, torch.float16, zeros=True),
    "w4a8": WeightFormat(4, 32, torch.float16, offsets=True, activations=True, input_group=32),
    "fp8": WeightFormat(8, e4m3=True),
}
PLAIN, WIDE = "bf16 (12 bits)", "bf16 (16 bits)"  # the latter where the values do not fit into 12


class Line(NamedTuple):
    """What a form took. of_read: the rate at which its own bytes are taken in, of that of a plain read. of_bf16,
    of_wide: how many times faster it is than bfloat16 in 12 and in 16 bits.
    """

    shape: str
    rows: int
    threads: int
    form: str
    num_bytes: int
    took_us: float
    gb_per_s: float
    gflop_per_s: float
    of_read: float
    of_bf16: float
    of_wide: float


def made(shape: tuple[int, int]) -> dict[str, list[Weight]]:
    """The forms of one matrix, as often as caches cannot hold."""
    matrix = torch.randn(shape).bfloat16()
    spread = (matrix * 2.0 ** torch.randint(-50, 50, shape)).bfloat16()
    plain = shape[0] * shape[1] * 2
    forms: dict[str, list[Weight]] = {}
    for name, rows in ((PLAIN, matrix), (WIDE, spread)):
        packed = make_packed([shape] * max(2, -(-CACHED_BYTES // plain)))
        for each in packed:
            each.put(0, rows)
        forms[name] = list(packed)
    for name, held in FORMATS.items():
        quantised = quantise(matrix, held)
        count = max(2, -(-CACHED_BYTES // held.num_bytes(*shape)))
        weights = [QuantisedWeight(*shape, held) for _ in range(count)]
        for weight in weights:
            weight.put(0, quantised)
        forms[name] = list(weights)
    return forms


def product(x: torch.Tensor, weights: list[Weight]) -> Callable[[int], object]:
    return lambda number: linear(x, weights[number % len(weights)])


def read(shape: tuple[int, int], all_rows: list[int], threads: int, rounds: int) -> list[Line]:
    resize_pool(threads)
    library = find_native().library
    assert library is not None
    forms = made(shape)
    memory = torch.empty(2 * CACHED_BYTES, dtype=torch.uint8)
    library.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    memory.zero_()
    found = []
    for rows in all_rows:
        x = torch.randn(rows, shape[1]).bfloat16()

        calls = {name: product(x, weights) for name, weights in forms.items()}
        calls["read"] = lambda _: library.read_memory(memory.data_ptr(), memory.nbytes)
        counts = {
            name: max(1, min(len(forms.get(name, "1")), int(ROUND_S / seconds(call, 1))))
            for name, call in calls.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name in list(calls)[:: -1 if number % 2 else 1]:
                time.sleep(QUIET_S)
                calls[name](-1)  # wakes its threads
                taken[name].append(seconds(calls[name], counts[name]))
        medians = {name: statistics.median(times) for name, times in taken.items()}
        read_rate = memory.nbytes / medians["read"]
        for name, weights in forms.items():
            rate = weights[0].nbytes / medians[name]
            found.append(
                Line(
                    f"{shape[0]}x{shape[1]}",
                    rows,
                    threads,
                    name,
                    weights[0].nbytes,
                    medians[name] * 1e6,
                    rate / 1e9,
                    2 * rows * shape[0] * shape[1] / medians[name] / 1e9,
                    rate / read_rate,
                    statistics.median(a / b for a, b in zip(taken[PLAIN], taken[name], strict=True)),
                    statistics.median(a / b for a, b in zip(taken[WIDE], taken[name], strict=True)),
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=integers, default=[1, 8, 64, 256, 1024])
    parser.add_argument("--shapes", type=shapes, default=shapes("4096x4096"))
    parser.add_argument("--threads", type=integers, default=[2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    lines: list[Line] = []
    for threads in arguments.threads:
        for shape in arguments.shapes:
            with console.status(f"{shape[0]}x{shape[1]}, {threads} threads"):
                lines += read(shape, arguments.rows, threads, arguments.rounds)
    table = Table("outputs x inputs", "rows", "threads", "weights", box=None)
    for name in ("µs", "GB/s", "GFLOP/s", "of a read", "of bf16", "of bf16 in 16 bits"):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            line.shape,
            str(line.rows),
            str(line.threads),
            line.form,
            f"{line.took_us:,.0f}",
            f"{line.gb_per_s:.1f}",
            f"{line.gflop_per_s:.0f}",
            f"{line.of_read:.0%}",
            f"x {line.of_bf16:.2f}",
            f"x {line.of_wide:.2f}",
        )
    Console(width=150).print(table)
    if arguments.json is not None:
        write_report(
            arguments.json,
            "cpu_quantised_linear",
            products=[line._asdict() for line in lines],
        )


if __name__ == "__main__":
    main()
