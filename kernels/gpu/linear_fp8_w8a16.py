"""`linear_fp8_w8a16`: y = x W^T + b with W in E4M3 (Micikevicius et al. 2022, arXiv 2209.05433), W[n, k] = scales[g, n]
* q[n, k], g = k // group size; on any GPU, since it is decoded by integer arithmetic.
"""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.linear import choice_for, columns_side_by_side
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.weight_only import weight_only
from phalanx.kernels.linear_table import Choice


def _fake(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    return x.new_empty((x.shape[0], q.shape[0]))


@operator(fake=_fake)
def linear_fp8_w8a16(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, group_size: int
) -> torch.Tensor:
    """x [m, k] of a floating dtype, q [n, k or more] float8_e4m3fn without not-a-numbers, scales [groups, n] of a
    floating dtype, bias [n] -> [m, n] of x's dtype. group_size: a multiple of 8, or at least k for one group.
    """
    return multiply(x, q, scales, bias, group_size)


def multiply(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    group_size: int,
    *,
    choice: Choice | None = None,
) -> torch.Tensor:
    """choice: by the table of the GPU where it is None."""
    out = _fake(x, q, scales, bias, group_size)
    if out.numel():
        weight_only(
            out,
            columns_side_by_side(x),
            q.view(torch.uint8),
            scales,
            None,
            bias,
            held="fp8",
            shift=0.0,
            group_size=group_size,
            choice=choice or choice_for(x, x.dtype, q.shape[0], held="fp8_w8a16"),
        )
    return out


def _example(m: int, n: int, k: int, group: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    scales = meta(-(-k // group), n, dtype=torch.float32)
    return linear_fp8_w8a16(meta(m, k, dtype=dtype), meta(n, k, dtype=torch.float8_e4m3fn), scales, None, group)


EXAMPLES = (
    Example("bf16 1x4096x4096", lambda: _example(1, 4096, 4096, 4096)),
    Example("bf16 2048x4096x4096", lambda: _example(2048, 4096, 4096, 4096), instructions=("wgmma",)),
)
