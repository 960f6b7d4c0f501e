"""What a device could do: bytes moved and operations calculated a second, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from phalanx.kernels import native_cpu

READING_S = 0.01  # a reading is as many calls as take so long
READINGS = 5  # of which the best counts


class Ceilings(NamedTuple):
    """bytes_per_s: of copying memory on a GPU, of reading it on a CPU. flops_per_s: of a large matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def least_us(self, num_bytes: float, num_flops: float) -> float:
        """What so much takes at least: the roofline (Williams, Waterman and Patterson 2009)."""
        return 1e6 * max(num_bytes / self.bytes_per_s, num_flops / self.flops_per_s)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """With the threads that operators have. Takes 256 MiB of a CPU's memory for the time of it, 1.5 GiB of a GPU's."""
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    x = torch.empty(1 << (29 if on_gpu else 28), dtype=torch.uint8, device=device)
    if on_gpu:
        y = torch.empty_like(x.fill_(1))
        copied_us = min(read_gpu(lambda _: y.copy_(x), 4)() for _ in range(READINGS))
        product_us = min(read_gpu(lambda _: a @ b, 4)() for _ in range(READINGS))
        return Ceilings(1e6 * 2 * x.nbytes / copied_us, 1e6 * 2.0 * size**3 / product_us)
    numbers = x.view(torch.float64)
    reads: list[Callable[[int], object]] = [lambda _: numbers.sum()]
    if native_cpu.LIBRARY is not None:  # as products read their weights: where the system gives huge pages, faster
        native_cpu.LIBRARY.advise_huge_pages(x.data_ptr(), x.nbytes)
        reads.append(lambda _: native_cpu.LIBRARY.read_memory(x.data_ptr(), x.nbytes))
    x.fill_(1)  # memory that was never written to is one page of zeros, and read from the cache
    read_us = min(read_cpu(read, 1)() for read in reads for _ in range(READINGS))
    product_us = min(read_cpu(lambda _: a @ b, 1)() for _ in range(READINGS))
    return Ceilings(1e6 * x.nbytes / read_us, 1e6 * 2.0 * size**3 / product_us)


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
