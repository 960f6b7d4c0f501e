"""Products in bfloat16 on this CPU: from packed weights, by torch from row-major ones, and what memory and cores allow.

    python benchmarks/cpu_linear.py [--rows 1,8,32] [--shapes 576x1536,4096x4096] [--threads 1,2] [--json FILE]

A shape is outputs x inputs. Each weight is there as many times as the caches cannot hold, and every product takes the
next one, as the layers of a model do. Native product, native product of a weight that does not fit into 12 bits and is
held in 16, torch's, and a plain read of as many bytes as the weight has in bfloat16 take turns; figures are medians.
The limit is the larger of that read and of computing at the best rate that any product of these threads had, torch's
included: from 12 bits, of which less is read, a product may pass it.
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
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from phalanx.kernels import choose_packing, linear, make_packed
from phalanx.native import find_native, resize_pool

SHAPES = "576x1536,576x960,4096x4096,2048x8192,49152x576"
ROWS = "1,2,4,8,16,32,64,256,1024"
CACHED_BYTES = 160 << 20  # of weights, at least: several times what the caches of a few cores hold
QUIET_S = 0.01  # in which threads of torch stop spinning, which took half of what the next one could read
ROUND_S = 0.06  # that a reading may take, where products are short


class Reading(NamedTuple):
    """Medians, in seconds a product (a read: of as many bytes as the weight has). wide: of a weight in 16 bits."""

    shape: tuple[int, int]
    rows: int
    threads: int
    native_s: float
    wide_s: float
    torch_s: float
    read_s: float

    @property
    def weight_bytes(self) -> int:
        return 2 * self.shape[0] * self.shape[1]

    @property
    def flops(self) -> int:
        return self.rows * self.weight_bytes


def seconds(call: Callable[[int], object], count: int) -> float:
    began_s = time.perf_counter()
    for number in range(count):
        call(number)
    return (time.perf_counter() - began_s) / count


def read(shape: tuple[int, int], all_rows: list[int], threads: int, rounds: int) -> list[Reading]:
    torch.set_num_threads(threads)
    resize_pool(threads)
    library = find_native().library
    assert library is not None
    size = 2 * shape[0] * shape[1]
    weight = torch.randn(shape).bfloat16()
    weights = [weight.clone() for _ in range(max(2, -(-CACHED_BYTES // size)))]
    spread = weight * 2.0 ** torch.randint(-50, 50, shape)
    packed, wide = (make_packed([shape] * len(weights)) for _ in range(2))
    for narrow, other in zip(packed, wide, strict=True):
        narrow.put(0, weight)
        other.put(0, spread.bfloat16())
    assert (packed[0].share_in_16_bits, wide[0].share_in_16_bits) == (0, 1)
    memory = torch.empty(len(weights) * size, dtype=torch.uint8)
    library.advise_huge_pages(memory.data_ptr(), memory.nbytes)
    memory.zero_()
    found = []
    for rows in all_rows:
        x = torch.randn(rows, shape[1]).bfloat16()

        def native(number: int, x: torch.Tensor = x) -> object:
            return linear(x, packed[number % len(packed)])

        def wides(number: int, x: torch.Tensor = x) -> object:
            return linear(x, wide[number % len(wide)])

        def torchs(number: int, x: torch.Tensor = x) -> object:
            return F.linear(x, weights[number % len(weights)])

        def plain_read(number: int) -> object:
            return library.read_memory(memory.data_ptr() + number % len(weights) * size, size)

        calls: list[Callable[[int], object]] = [native, wides, torchs, plain_read]
        counts = [max(1, min(len(weights), int(ROUND_S / seconds(call, 1)))) for call in calls]
        taken: list[list[float]] = [[] for _ in calls]
        for _ in range(rounds):
            for call, count, times in zip(calls, counts, taken, strict=True):
                time.sleep(QUIET_S)
                call(-1)  # wakes its threads
                times.append(seconds(call, count))
        found.append(Reading(shape, rows, threads, *(statistics.median(times) for times in taken)))
    return found


def with_limits(readings: list[Reading]) -> list[dict[str, float | int | str]]:
    lines: list[dict[str, float | int | str]] = []
    for each in readings:
        alike = [other for other in readings if other.threads == each.threads]
        best = max(other.flops / min(other.native_s, other.torch_s) for other in alike)
        read_s = statistics.median(other.read_s for other in alike if other.shape == each.shape)
        limit_s = max(read_s, each.flops / best)
        lines.append(
            {
                "shape": f"{each.shape[0]}x{each.shape[1]}",
                "rows": each.rows,
                "threads": each.threads,
                "native_us": each.native_s * 1e6,
                "native_16_bits_us": each.wide_s * 1e6,
                "torch_us": each.torch_s * 1e6,
                "native_gb_per_s": each.weight_bytes / each.native_s / 1e9,
                "read_gb_per_s": each.weight_bytes / read_s / 1e9,
                "native_gflop_per_s": each.flops / each.native_s / 1e9,
                "times_torch": each.torch_s / each.native_s,
                "of_limit": limit_s / each.native_s,
            }
        )
    return lines


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def shapes(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(k)) for n, _, k in (part.partition("x") for part in text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=integers, default=integers(ROWS))
    parser.add_argument("--shapes", type=shapes, default=shapes(SHAPES))
    parser.add_argument("--threads", type=integers, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    packing = choose_packing(torch.bfloat16, torch.device("cpu"))
    if not packing.usable:
        parser.error(f"there are no native products here: {packing.told}")

    console = Console(stderr=True)
    readings: list[Reading] = []
    for threads in arguments.threads:
        for shape in arguments.shapes:
            with console.status(f"{shape[0]}x{shape[1]}, {threads} threads"):
                readings += read(shape, arguments.rows, threads, arguments.rounds)
    lines = with_limits(readings)
    table = Table("outputs x inputs", box=None, title=f"products from packed weights: {packing.told}")
    for name in (
        "rows",
        "threads",
        "native µs",
        "16 bits µs",
        "torch µs",
        "ratio",
        "GB/s",
        "read GB/s",
        "GFLOP/s",
        "of limit",
    ):
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(
            str(line["shape"]),
            str(line["rows"]),
            str(line["threads"]),
            f"{line['native_us']:,.0f}",
            f"{line['native_16_bits_us']:,.0f}",
            f"{line['torch_us']:,.0f}",
            f"{line['times_torch']:.2f}",
            f"{line['native_gb_per_s']:.1f}",
            f"{line['read_gb_per_s']:.1f}",
            f"{line['native_gflop_per_s']:.0f}",
            f"{line['of_limit']:.0%}",
        )
    Console().print(table)
    if arguments.json:
        report = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "products": lines}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
