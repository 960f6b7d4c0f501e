"""Launches that stand for how an operator is used: what `ahead_of_time` compiles and checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Example:
    """A call of a launcher on tensors of device `meta`, whose launches are compiled as they would be on a GPU.

    archs: to be compiled for. instructions: that its kernels for sm_90 must have, of `wgmma` and `tma`.
    """

    name: str
    call: Callable[[], object]
    archs: tuple[int, ...] = (80, 90)
    instructions: tuple[str, ...] = ()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory. To Triton its address is 0, which is aligned as PyTorch's memory is."""
    return torch.empty(shape, dtype=dtype, device="meta")
