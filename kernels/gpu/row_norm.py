"""What RMSNorm and LayerNorm share: rows that are added to, normalised, and perhaps quantised, in one pass.

A row up to `ONE_PASS` columns is held in registers; a longer one is read again for each thing that is asked of it,
mostly from the L2 cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.narrow import narrowed
from phalanx.kernels.quantised_rows import LEAST, limit_of

ONE_PASS = 16384  # columns

_TILE = 1024  # numbers that a program takes at least, of several rows where they are short
_LOOP_BLOCK = 4096  # columns that are taken at a time of a row beyond ONE_PASS


@triton.jit
def _summed(
    x, residual, sums, row, column, inside, x_stride, residual_stride, WIDTH: tl.constexpr, STORES: tl.constexpr
):
    """x, or x + residual rounded to the dtype and stored in `sums`; float32, zeros outside."""
    values = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if residual is not None:
        values = values.to(tl.float32) + tl.load(residual + row * residual_stride + column, mask=inside, other=0.0)
        values = values.to(x.dtype.element_ty)
        if STORES:
            tl.store(sums + row * WIDTH + column, values, mask=inside)
    return values.to(tl.float32)


@triton.jit
def _gained(values, weight, bias, column, inside):
    values *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def row_norm_kernel(
    out,
    scales,
    sums,
    x,
    residual,
    weight,
    bias,
    x_stride,
    residual_stride,
    eps,
    num_rows,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CENTRED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A program `ROWS` whole rows. Tensors that are None are not asked for. LIMIT: of the 8-bit dtype of `out`."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < num_rows) & (column < WIDTH)
    values = _summed(x, residual, sums, row, column, inside, x_stride, residual_stride, WIDTH, True)
    if CENTRED:
        values = tl.where(inside, values - (tl.sum(values, 1) / WIDTH)[:, None], 0.0)
    values *= tl.rsqrt(tl.sum(values * values, 1) / WIDTH + eps)[:, None]
    values = _gained(values, weight, bias, column, column < WIDTH)
    at = row * WIDTH + column
    if scales is None:
        tl.store(out + at, values.to(out.dtype.element_ty), mask=inside)
    else:
        amax = tl.maximum(tl.max(tl.abs(values), 1), LEAST)[:, None]
        tl.store(scales + row, amax / LIMIT, mask=row < num_rows)
        whole: tl.constexpr = out.dtype.element_ty == tl.int8
        tl.store(out + at, narrowed(values, LIMIT / amax, LIMIT, whole, out.dtype.element_ty), mask=inside)


@triton.jit
def long_row_norm_kernel(
    out,
    scales,
    sums,
    x,
    residual,
    weight,
    bias,
    x_stride,
    residual_stride,
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    CENTRED: tl.constexpr,
    LIMIT: tl.constexpr,
    LEAST: tl.constexpr,
):
    """A program a row, a block of columns at a time."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mean = 0.0
    total = tl.zeros((BLOCK,), tl.float32)
    if CENTRED:
        for start in range(0, WIDTH, BLOCK):
            at = start + column
            total += _summed(x, residual, sums, row, at, at < WIDTH, x_stride, residual_stride, WIDTH, False)
        mean = tl.sum(total, 0) / WIDTH
        total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + column
        values = _summed(x, residual, sums, row, at, at < WIDTH, x_stride, residual_stride, WIDTH, True)
        values = tl.where(at < WIDTH, values - mean, 0.0)
        total += values * values
    inverse = tl.rsqrt(tl.sum(total, 0) / WIDTH + eps)
    if scales is not None:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, WIDTH, BLOCK):
            at = start + column
            values = _summed(x, residual, sums, row, at, at < WIDTH, x_stride, residual_stride, WIDTH, False)
            largest = tl.maximum(largest, tl.abs(_gained((values - mean) * inverse, weight, bias, at, at < WIDTH)))
        amax = tl.maximum(tl.max(largest, 0), LEAST)
        tl.store(scales + row, amax / LIMIT)
    for start in range(0, WIDTH, BLOCK):
        at = start + column
        values = _summed(x, residual, sums, row, at, at < WIDTH, x_stride, residual_stride, WIDTH, False)
        values = _gained((values - mean) * inverse, weight, bias, at, at < WIDTH)
        if scales is None:
            tl.store(out + row * WIDTH + at, values.to(out.dtype.element_ty), mask=at < WIDTH)
        else:
            whole: tl.constexpr = out.dtype.element_ty == tl.int8
            q = narrowed(values, LIMIT / amax, LIMIT, whole, out.dtype.element_ty)
            tl.store(out + row * WIDTH + at, q, mask=at < WIDTH)


class Normed(NamedTuple):
    """out: of x's shape. scales: one a row, where `out` is quantised; sums: x + residual, where there is one."""

    out: torch.Tensor
    scales: torch.Tensor | None
    sums: torch.Tensor | None


def row_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    centred: bool = False,
) -> Normed:
    """Normalises x [..., N], or x + residual rounded to the dtype, over the last dimension. dtype: to quantise to."""
    width = x.shape[-1]
    limit = 0.0 if dtype is None else limit_of(dtype)
    rows = as_rows(x)
    added = None if residual is None else as_rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    scales = None if dtype is None else torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    sums = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    normed = Normed(out, scales, sums)
    if not out.numel():
        return normed
    strides = rows.stride(0), 0 if added is None else added.stride(0)
    arguments = (out, scales, sums, rows, added, weight, bias, *strides, eps)
    constants = {"WIDTH": width, "CENTRED": centred, "LIMIT": limit, "LEAST": LEAST}
    if width > ONE_PASS:
        long_row_norm_kernel[(len(rows),)](*arguments, **constants, BLOCK=_LOOP_BLOCK, num_warps=16)
        return normed
    block = triton.next_power_of_2(width)
    rows_each = max(1, _TILE // block)
    num_warps = max(2, min(32, rows_each * block // 512))
    row_norm_kernel[(triton.cdiv(len(rows), rows_each),)](
        *arguments, len(rows), **constants, BLOCK=block, ROWS=rows_each, num_warps=num_warps
    )
    return normed


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x [..., N] as [rows, N], its columns side by side: a view where its strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
