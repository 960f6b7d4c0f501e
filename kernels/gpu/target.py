"""The GPU that a launcher chooses its kernel for: that of its tensors, or one that is assumed where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Target(NamedTuple):
    """arch: compute capability as a number, 80 for 8.0. num_sms: streaming multiprocessors."""

    arch: int
    num_sms: int


A100 = Target(80, 108)
H100 = Target(90, 132)

_assumed: list[Target] = []


def target_of(x: torch.Tensor) -> Target:
    """The GPU of a CUDA tensor; for any other, the one that is assumed."""
    if x.is_cuda:
        return _cuda_target(x.get_device())
    if not _assumed:
        raise RuntimeError(f"the operators of GPUs were called with a tensor on {x.device}; move it to a CUDA device")
    return _assumed[-1]


@contextmanager
def assumed(target: Target) -> Iterator[None]:
    """For tensors that are on no GPU: while kernels are interpreted, or compiled ahead of time."""
    _assumed.append(target)
    try:
        yield
    finally:
        _assumed.pop()


@cache
def _cuda_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(properties.major * 10 + properties.minor, properties.multi_processor_count)
