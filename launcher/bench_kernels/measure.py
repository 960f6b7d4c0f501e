"""How long operators take, beside what the device could do."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from phalanx.kernels.ceilings import Ceilings, read_cpu, read_gpu
from phalanx.launcher.bench_kernels.cases import Case


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
    peer_name: str = "torch"

    @property
    def not_torch(self) -> str:
        """The name of another peer than PyTorch's usual operator, behind a figure."""
        return "" if self.peer_name == "torch" else f", {self.peer_name}"

    @property
    def share(self) -> float:
        """Of the roofline, that is reached."""
        return self.least_us / self.taken_us


def read_case(case: Case, ceilings: Ceilings, device: torch.device, rounds: int) -> KernelReading:
    """The operator and its peer take turns."""
    calls = [case.call] if case.peer is None else [case.call, case.peer]
    runs = [
        read_gpu(call, case.num_copies) if device.type == "cuda" else read_cpu(call, case.num_copies) for call in calls
    ]
    taken_us: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, readings in zip(runs, taken_us, strict=True):
            readings.append(run())
    medians = [statistics.median(readings) for readings in taken_us]
    peer_us = medians[1] if len(medians) > 1 else None
    counted = case.num_bytes, case.num_flops
    return KernelReading(
        case.operator, case.load, medians[0], peer_us, ceilings.least_us(*counted), *counted, case.peer_name
    )
