"""`linear_w8a16`: y = x W^T + b with W in 8-bit integers, W[n, k] = scales[g, n] * q[n, k] + offsets[g, n], where g is
k // group size, or 0 where an output has one scale.
"""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.linear import choice_for, columns_side_by_side
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.weight_only import weight_only
from phalanx.kernels.linear_table import Choice


def _fake(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], q.shape[0]))


@operator(fake=_fake)
def linear_w8a16(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """x [m, k] of a floating dtype, q [n, k or more] int8, scales and offsets [groups, n] of one, bias [n] -> [m, n] of
    x's dtype. group_size: a multiple of 8, or at least k for one group.
    """
    return multiply(x, q, scales, offsets, bias, group_size)


def multiply(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    *,
    choice: Choice | None = None,
) -> torch.Tensor:
    """choice: by the table of the GPU where it is None."""
    out = _fake(x, q, scales, offsets, bias, group_size)
    if out.numel():
        weight_only(
            out,
            columns_side_by_side(x),
            q,
            scales,
            offsets,
            bias,
            held="int8",
            shift=0.0,
            group_size=group_size,
            choice=choice or choice_for(x, x.dtype, q.shape[0], held="w8a16"),
        )
    return out


def _example(m: int, n: int, k: int, group: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    scales = meta(-(-k // group), n, dtype=torch.float32)
    return linear_w8a16(meta(m, k, dtype=dtype), meta(n, k, dtype=torch.int8), scales, None, None, group)


EXAMPLES = (
    Example("bf16 16x4096x4096 by 32", lambda: _example(16, 4096, 4096, 32), instructions=("wgmma",)),
    Example("fp16 2048x4096x4096", lambda: _example(2048, 4096, 4096, 4096, torch.half), instructions=("wgmma",)),
)
