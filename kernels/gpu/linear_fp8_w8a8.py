"""`linear_fp8_w8a8`: y = (x_scales x) (scales W)^T + b, x and W in E4M3 (Micikevicius et al. 2022, arXiv 2209.05433),
by the matrix units that GPUs have for it from compute capability 8.9 on; with scales of a tensor, an output, or a block
of 128 x 128 (DeepSeek-AI 2024, arXiv 2412.19437, section 3.3).

Sums over all inputs stay in the matrix units, whose own sums of 8-bit floats are of about 14 bits; with groups of
inputs they are added in float32 after each.
"""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.both_quantised import BLOCK, both_quantised
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
def linear_fp8_w8a8(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [m, k] and q [n, k or more] float8_e4m3fn, bias [n] -> [m, n] of `dtype`.

    x_scales [m], or [m, k / 128] of groups of inputs; scales [1], [n], [n, k / 128] or, of blocks, [n / 128, k / 128],
    rounded up; all float32.
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
        choice = choice or choice_for(x, dtype, q.shape[0], held="fp8_w8a8")
        of_rows, of_outputs = (each.unsqueeze(1) if each.dim() == 1 else each for each in (x_scales, scales))
        both_quantised(out, x, of_rows, q, of_outputs, bias, choice)
    return out


def _example(m: int, n: int, k: int, *, blocks: bool = False) -> torch.Tensor:
    def fp8(*shape: int) -> torch.Tensor:
        return meta(*shape, dtype=torch.float8_e4m3fn)

    groups = k // BLOCK
    x_scales = meta(m, groups, dtype=torch.float32) if blocks else meta(m, dtype=torch.float32)
    scales = meta(n // BLOCK, groups, dtype=torch.float32) if blocks else meta(n, dtype=torch.float32)
    return linear_fp8_w8a8(fp8(m, k), x_scales, fp8(n, k), scales, None, torch.bfloat16)


EXAMPLES = (
    Example("bf16 1x4096x4096", lambda: _example(1, 4096, 4096), (90,), ("wgmma",)),
    Example("bf16 16x4096x4096, blocks", lambda: _example(16, 4096, 4096, blocks=True), (90,), ("wgmma",)),
    Example("bf16 4096x8192x4096", lambda: _example(4096, 8192, 4096), (90,), ("wgmma", "tma")),
    Example("bf16 4096x8192x4096, blocks", lambda: _example(4096, 8192, 4096, blocks=True), (90,), ("wgmma", "tma")),
)
