"""`linear_w8a8`: y = x_scales * scales * (x W^T) + b with x and W in int8 and exact sums in int32 (Dettmers et al.
2022, arXiv 2208.07339; Xiao et al. 2022, arXiv 2211.10438).
"""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.both_quantised import both_quantised
from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.linear import choice_for
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.linear_table import Choice


def _fake(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], q.shape[0]), dtype=dtype)


@operator(fake=_fake)
def linear_w8a8(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [m, k] int8, x_scales [m] float32, as `quantise_rows` and the norms give them; q [n, k or more] int8, scales
    [n] float32, bias [n] -> [m, n] of `dtype`.
    """
    return multiply(x, x_scales, q, scales, bias, dtype)


def multiply(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    choice: Choice | None = None,
) -> torch.Tensor:
    """choice: by the table of the GPU where it is None."""
    out = _fake(x, x_scales, q, scales, bias, dtype)
    if out.numel():
        choice = choice or choice_for(x, dtype, q.shape[0], held="w8a8")
        both_quantised(out, x, x_scales.view(-1, 1), q, scales.view(-1, 1), bias, choice)
    return out


def _example(m: int, n: int, k: int) -> torch.Tensor:
    def int8(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.int8)

    scales = meta(m, dtype=torch.float32), meta(n, dtype=torch.float32)
    return linear_w8a8(int8(m, k), scales[0], int8(n, k), scales[1], meta(n), torch.bfloat16)


EXAMPLES = (  # with `both_quantised`
    Example("bf16 1x4096x4096", lambda: _example(1, 4096, 4096), instructions=("wgmma",)),
    Example("bf16 4096x8192x4096", lambda: _example(4096, 8192, 4096), instructions=("wgmma", "tma")),
)
