"""`quantise_rows`: rows in 8 bits, each with a scale of its own, or one for each group of its columns.

q = round(x * limit / amax), scale = amax / limit (Xiao et al. 2022, arXiv 2211.10438).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.narrow import narrowed
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.row_norm import as_rows
from phalanx.kernels.quantised_rows import LEAST, limit_of

_TILE = 2048  # numbers that a program takes at a time, of several groups where they are short


@triton.jit
def _quantise_rows_kernel(
    out,
    scales,
    x,
    x_stride,
    num_groups,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A program `EACH` groups of `SIZE` columns, of rows of `WIDTH`; read twice where they are longer than a block."""
    group = (tl.program_id(0) * EACH + tl.arange(0, EACH))[:, None].to(tl.int64)
    groups_a_row: tl.constexpr = WIDTH // SIZE
    first = group % groups_a_row * SIZE
    row, column = group // groups_a_row, tl.arange(0, BLOCK)[None, :]
    held = group < num_groups
    amax = tl.zeros((EACH, BLOCK), tl.float32)
    for start in tl.static_range(0, SIZE, BLOCK):
        inside = held & (start + column < SIZE)
        values = tl.load(x + row * x_stride + first + start + column, mask=inside, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.abs(values))
    largest = tl.maximum(tl.max(amax, 1), LEAST)[:, None]
    tl.store(scales + group, largest / LIMIT, mask=held)
    whole: tl.constexpr = out.dtype.element_ty == tl.int8
    for start in tl.static_range(0, SIZE, BLOCK):
        inside = held & (start + column < SIZE)
        values = tl.load(x + row * x_stride + first + start + column, mask=inside, other=0.0).to(tl.float32)
        q = narrowed(values, LIMIT / largest, LIMIT, whole, out.dtype.element_ty)
        tl.store(out + row * WIDTH + first + start + column, q, mask=inside)


def _fake(x: torch.Tensor, dtype: torch.dtype, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    groups = () if group_size is None else (x.shape[-1] // group_size,)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((*x.shape[:-1], *groups), dtype=torch.float32)


@operator(fake=_fake)
def quantise_rows(x: torch.Tensor, dtype: torch.dtype, group_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `phalanx.kernels.quantise_rows`, which calls it."""
    rows = as_rows(x)
    out, scales = _fake(x, dtype, group_size)
    if out.numel():
        width = rows.shape[1]
        size = width if group_size is None else group_size
        block = min(_TILE, triton.next_power_of_2(size))
        each = _TILE // block
        grid = (triton.cdiv(scales.numel(), each),)
        _quantise_rows_kernel[grid](
            out,
            scales,
            rows,
            rows.stride(0),
            scales.numel(),
            WIDTH=width,
            SIZE=size,
            BLOCK=block,
            EACH=each,
            LIMIT=limit_of(dtype),
            LEAST=LEAST,
            num_warps=4,
        )
    return out, scales


EXAMPLES = (
    Example("int8 4096", lambda: quantise_rows(meta(32, 4096), torch.int8, None)),
    Example("int8 14336", lambda: quantise_rows(meta(32, 14336), torch.int8, None)),
    Example("fp8 4096 by 128", lambda: quantise_rows(meta(32, 4096), torch.float8_e4m3fn, 128), archs=(90,)),
)
