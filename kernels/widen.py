"""`widen`: numbers as float32."""

from __future__ import annotations

import torch

from phalanx.kernels import native_cpu


def widen(x: torch.Tensor) -> torch.Tensor:
    """x in float32, the same numbers.

    A row of logits is large enough for torch to take its own threads, which in a program that has not told them
    otherwise (`GOMP_SPINCOUNT`) spin for milliseconds behind it, on the cores that the next operators need.
    """
    if x.dtype != torch.bfloat16 or native_cpu.code_of(x) is None or not x.is_contiguous():
        return x.float()
    out = torch.empty(x.shape, dtype=torch.float32)
    native_cpu.LIBRARY.widen(out.data_ptr(), x.data_ptr(), x.numel())
    return out
