"""Products of 8-bit activations and 8-bit weights, in the matrix units' own sums: int32 of int8, float32 of E4M3.

As in `weight_only` the product is made as (W x^T)^T, so that few rows of x take the narrow side of the matrix units.
Scales count once at the end, or once a block of inputs where either side has one for each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from phalanx.kernels.gpu.linear_parts import finished
from phalanx.kernels.gpu.linear_persistent import describable, loaded
from phalanx.kernels.gpu.linear_shares import met, room_to_meet, share_start, shared_by
from phalanx.kernels.gpu.target import target_of
from phalanx.kernels.linear_table import Choice

BLOCK = 128
"""Inputs that share a scale, and outputs, in matrices that are cut into blocks."""


@triton.jit
def _scaled(
    sums,
    x_scales,
    scales,
    row,
    column,
    block,
    num_rows,
    N: tl.constexpr,
    X_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS_EACH: tl.constexpr,
):
    """Sums over a block of inputs, or over all of them, as what they stand for."""
    x_at = row * X_GROUPS + (block if X_GROUPS > 1 else 0)
    at = column // OUTPUTS_EACH * GROUPS + (block if GROUPS > 1 else 0)
    of_rows = tl.load(x_scales + x_at, mask=row < num_rows, other=0.0)[None, :]
    of_columns = tl.load(scales + at, mask=column < N, other=0.0)[:, None]
    return sums.to(tl.float32) * (of_columns * of_rows)


@triton.jit(do_not_specialize=["num_rows"])
def both_quantised_kernel(
    out,
    x,
    x_scales,
    weight,
    scales,
    bias,
    partials,
    counters,
    x_stride,
    weight_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    X_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    OUTPUTS_EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """X_GROUPS, GROUPS: scales of a row of x, of an output. OUTPUTS_EACH: outputs that share theirs. WHOLE: whether
    numbers are int8. TMA: whether x and weight are tensor descriptors.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K  # of a tile
    GROUPED: tl.constexpr = X_GROUPS > 1 or GROUPS > 1
    sums_dtype: tl.constexpr = tl.int32 if WHOLE else tl.float32
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    num_steps = tiles_m * ((N + BLOCK_N - 1) // BLOCK_N) * STEPS
    begin = share_start(program, num_steps, num_programs)
    end = share_start(program + 1, num_steps, num_programs)
    in_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    for tile in range(begin // STEPS, tl.cdiv(end, STEPS)):
        first = tl.maximum(begin - tile * STEPS, 0)
        last = tl.minimum(end - tile * STEPS, STEPS)
        m, n = tile % tiles_m * BLOCK_M, tile // tiles_m * BLOCK_N
        row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUPED else sums_dtype)
        for step in range(first, last):
            w = loaded(weight, n, step * BLOCK_K, weight_stride, N, K, BLOCK_N, BLOCK_K, TMA)
            part = loaded(x, m, step * BLOCK_K, x_stride, num_rows, K, BLOCK_M, BLOCK_K, TMA)
            if GROUPED:
                here = tl.dot(w, part.T, out_dtype=sums_dtype)
                total += _scaled(here, x_scales, scales, row, column, step, num_rows, N, X_GROUPS, GROUPS, OUTPUTS_EACH)
            else:
                total = tl.dot(w, part.T, total, out_dtype=sums_dtype)
        whole = last - first == STEPS
        if counters is not None:  # or else there is a program a tile
            if not whole:
                total, _, whole = met(
                    total,
                    total,
                    partials,
                    counters,
                    in_tile,
                    tile,
                    program,
                    first,
                    num_steps,
                    num_programs,
                    STEPS,
                    False,
                )
        if whole:
            y = total
            if not GROUPED:
                y = _scaled(total, x_scales, scales, row, column, 0, num_rows, N, 1, 1, OUTPUTS_EACH)
            rows, columns = row[None, :].to(tl.int64), column[:, None]
            inside = (rows < num_rows) & (columns < N)
            y = finished(y, y, bias, None, rows, columns, inside, 0, N, "")
            tl.store(out + rows * N + columns, y.to(out.dtype.element_ty), mask=inside)


def both_quantised(
    out: torch.Tensor,
    x: torch.Tensor,
    x_scales: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    choice: Choice,
) -> None:
    """Fills out [m, n]. x [m, k] and weight [n, k or more], of one 8-bit dtype; their columns lie side by side.

    x_scales: [m, groups] float32; scales: [outputs, groups] float32, as many outputs as there are, or one for all or
    each `BLOCK` of them. Groups are of `BLOCK` inputs, or one of all.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[1]
    block_m, block_n, block_k = choice.block_m, choice.block_n, choice.block_k
    x_groups, groups = x_scales.shape[1], scales.shape[1]
    grouped = x_groups > 1 or groups > 1
    if grouped:
        block_k = BLOCK
    tma = choice.kernel == "tiles" and target_of(x).arch >= 90 and describable(x) and describable(weight)
    tensors: tuple[Any, Any] = x, weight
    if tma:
        tensors = (
            TensorDescriptor.from_tensor(x, [block_m, block_k]),
            TensorDescriptor.from_tensor(weight, [block_n, block_k]),
        )
    tiles = triton.cdiv(num_rows, block_m) * triton.cdiv(num_outputs, block_n)
    num_programs = shared_by(x, tiles, triton.cdiv(num_inputs, block_k), choice)
    sums = torch.int32 if x.dtype == torch.int8 and not grouped else torch.float32
    both_quantised_kernel[(num_programs,)](
        out,
        tensors[0],
        x_scales.contiguous(),
        tensors[1],
        scales.contiguous(),
        bias,
        *(room_to_meet(x, num_programs, block_m * block_n, sums) if choice.kernel == "stream_k" else (None, None)),
        x.stride(0),
        weight.stride(0),
        num_rows,
        N=num_outputs,
        K=num_inputs,
        X_GROUPS=x_groups,
        GROUPS=groups,
        OUTPUTS_EACH=1 if len(scales) == num_outputs else num_outputs if len(scales) == 1 else BLOCK,
        WHOLE=x.dtype == torch.int8,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        TMA=tma,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
