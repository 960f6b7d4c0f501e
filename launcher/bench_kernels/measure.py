"""How long operators take, and what the device could do: bytes moved and products calculated a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from phalanx.launcher.bench_kernels.cases import Case

READING_S = 0.01  # a reading is as many calls as take so long


class Ceilings(NamedTuple):
    """bytes_per_s: of copying memory on a GPU, of reading it on a CPU. flops_per_s: of a large matrix product."""

    bytes_per_s: float
    flops_per_s: float

    def least_us(self, case: Case) -> float:
        """What the case takes at least: the roofline (Williams, Waterman and Patterson 2009)."""
        return 1e6 * max(case.num_bytes / self.bytes_per_s, case.num_flops / self.flops_per_s)


class KernelReading(NamedTuple):
    """Medians, in µs; the rest as of `Case` and `Ceilings`. peer_us: None where there is no peer. Without the case
    itself, which holds its inputs.
    """

    operator: str
    load: str
    taken_us: float
    peer_us: float | None
    least_us: float
    num_bytes: float
    num_flops: float

    @property
    def share(self) -> float:
        """Of the roofline, that is reached."""
        return self.least_us / self.taken_us


def read_case(case: Case, ceilings: Ceilings, device: torch.device, rounds: int) -> KernelReading:
    """The operator and its peer take turns."""
    calls = [case.call] if case.peer is None else [case.call, case.peer]
    runs = [
        _on_gpu(call, case.num_copies) if device.type == "cuda" else _on_cpu(call, case.num_copies) for call in calls
    ]
    taken_us: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, readings in zip(runs, taken_us, strict=True):
            readings.append(run())
    medians = [statistics.median(readings) for readings in taken_us]
    peer_us = medians[1] if len(medians) > 1 else None
    counted = case.num_bytes, case.num_flops
    return KernelReading(case.operator, case.load, medians[0], peer_us, ceilings.least_us(case), *counted)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    x = torch.zeros(1 << (29 if on_gpu else 25), dtype=torch.float64 if not on_gpu else torch.uint8, device=device)
    if on_gpu:
        y = torch.empty_like(x)
        copied_us = min(_on_gpu(lambda _: y.copy_(x), 4)() for _ in range(5))
        product_us = min(_on_gpu(lambda _: a @ b, 4)() for _ in range(5))
        return Ceilings(1e6 * 2 * x.nbytes / copied_us, 1e6 * 2.0 * size**3 / product_us)
    read_us = min(_on_cpu(lambda _: x.sum(), 1)() for _ in range(5))
    product_us = min(_on_cpu(lambda _: a @ b, 1)() for _ in range(5))
    return Ceilings(1e6 * x.nbytes / read_us, 1e6 * 2.0 * size**3 / product_us)


def _on_cpu(call: Callable[[int], object], num_copies: int) -> Callable[[], float]:
    """A reading, in µs a call; warmed up."""

    def reading(num_calls: int) -> float:
        began_s = time.perf_counter()
        for number in range(num_calls):
            call(number % num_copies)
        return (time.perf_counter() - began_s) / num_calls

    reading(1)
    num_calls = max(1, round(READING_S / max(reading(2), 1e-7)))
    return lambda: 1e6 * reading(num_calls)


def _on_gpu(call: Callable[[int], object], num_copies: int) -> Callable[[], float]:
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
