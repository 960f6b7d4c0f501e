"""What a device could do: bytes moved and operations calculated a second, measured."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from phalanx.kernels import native_cpu

READING_S = 0.01  # a reading is as many calls as take so long
READINGS = 5  # of which the best counts
PART_BYTES = 1 << 23

Reader = Callable[[Callable[[int], object], int], Callable[[], float]]


class Ceilings(NamedTuple):
    """bytes_per_s: of copying memory on a GPU, of reading it on a CPU. flops_per_s: of a large matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def least_us(self, num_bytes: float, num_flops: float) -> float:
        """What so much takes at least: the roofline (Williams, Waterman and Patterson 2009)."""
        return 1e6 * max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """With the threads that operators have. Takes 256 MiB of a CPU's memory for the time of it, 1 GiB of a GPU's."""
    if device.type == "cuda":
        x = torch.ones(1 << 29, dtype=torch.uint8, device=device)
        y = torch.empty_like(x)
        copied_us = min(read_gpu(lambda _: y.copy_(x), 4)() for _ in range(READINGS))
        return Ceilings(1e6 * 2 * x.nbytes / copied_us, _flops_per_s(read_gpu, 8192, 4, device, dtype))
    sizes = 512, 1024  # the smaller one ends within a turn, where ranks share cores
    return Ceilings(_read_bytes_per_s(), max(_flops_per_s(read_cpu, size, 1, device, dtype) for size in sizes))


def _flops_per_s(read: Reader, size: int, num_calls: int, device: torch.device, dtype: torch.dtype) -> float:
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 1e6 * 2.0 * size**3 / min(read(lambda _: a @ b, num_calls)() for _ in range(READINGS))


def _read_bytes_per_s() -> float:
    """By parts of a memory that no cache holds, of which a quarter is read faster. A part is short beside the turns in
    which ranks use a core that they share.
    """
    x = torch.empty(1 << 28, dtype=torch.uint8)
    library = native_cpu.LIBRARY
    if library is not None:
        library.advise_huge_pages(x.data_ptr(), x.nbytes)
    x.fill_(1)  # memory that was never written to is one page of zeros, and read from the cache
    parts = torch.split(x, PART_BYTES)
    reads: list[Callable[[torch.Tensor], object]] = [lambda part: part.view(torch.float64).sum()]
    if library is not None:  # as products read their weights
        reads.append(lambda part: library.read_memory(part.data_ptr(), part.nbytes))
    return max(PART_BYTES / statistics.quantiles(_part_seconds(read, parts), n=4)[0] for read in reads)


def _part_seconds(read: Callable[[torch.Tensor], object], parts: Sequence[torch.Tensor]) -> list[float]:
    taken_s = []
    for part in READINGS * tuple(parts):
        began_s = time.perf_counter()
        read(part)
        taken_s.append(time.perf_counter() - began_s)
    return taken_s


def read_cpu(call: Callable[[int], object], num_copies: int) -> Callable[[], float]:
    """A reading, in µs a call; warmed up."""

    def reading(num_calls: int) -> float:
        began_s = time.perf_counter()
        for number in range(num_calls):
            call(number % num_copies)
        return (time.perf_counter() - began_s) / num_calls

    reading(1)
    num_calls = max(1, round(READING_S / max(reading(2), 1e-7)))
    return lambda: 1e6 * reading(num_calls)


def read_gpu(call: Callable[[int], object], num_copies: int) -> Callable[[], float]:
    """The same, of a CUDA graph that goes through all copies."""
    for number in range(2):
        call(number % num_copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for number in range(num_copies):
            call(number)

    def reading() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / num_copies

    reading()
    return reading
