"""Products of few rows: every program reads an equal share of the weights, wherever tiles begin and end; see
`linear_shares`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.linear_parts import finished
from phalanx.kernels.gpu.linear_shares import met, room_to_meet, share_start, shared_by
from phalanx.kernels.linear_table import Choice


@triton.jit
def _tile_sums(
    x,
    weight,
    row,
    column,
    x_stride,
    weight_stride,
    num_rows,
    first,
    last,
    N: tl.constexpr,
    K: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
):
    """Sums of a tile over the blocks of K from `first` to `last`; where it is gated, the other half's beside them."""
    at = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED else total
    x_block = x + row.to(tl.int64)[:, None] * x_stride + at[None, :]
    w_block = weight + column.to(tl.int64)[:, None] * weight_stride + at[None, :]
    for step in range(first, last):
        start = step * BLOCK_K
        inside_k = (start + at < K)[None, :]
        inside_w = inside_k & (column < OUTPUTS)[:, None]
        if K % BLOCK_K == 0 and OUTPUTS % BLOCK_N == 0:
            w = tl.load(w_block + start)
        else:
            w = tl.load(w_block + start, mask=inside_w, other=0.0)
        part = tl.load(x_block + start, mask=inside_k & (row < num_rows)[:, None], other=0.0)
        total = tl.dot(part, w.T, total)
        if GATED:
            beside = w_block + start + tl.full((), OUTPUTS, tl.int64) * weight_stride
            if K % BLOCK_K == 0 and OUTPUTS % BLOCK_N == 0:
                w_up = tl.load(beside)
            else:
                w_up = tl.load(beside, mask=inside_w, other=0.0)
            up = tl.dot(part, w_up.T, up)
    return total, up


@triton.jit(do_not_specialize=["num_rows"])
def stream_k_kernel(
    out,
    x,
    weight,
    bias,
    residual,
    partials,
    counters,
    x_stride,
    weight_stride,
    residual_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATE: tl.constexpr,
):
    GATED: tl.constexpr = GATE != ""
    OUTPUTS: tl.constexpr = N // 2 if GATED else N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K  # of a tile
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    num_steps = tiles_m * ((OUTPUTS + BLOCK_N - 1) // BLOCK_N) * STEPS
    begin = share_start(program, num_steps, num_programs)
    end = share_start(program + 1, num_steps, num_programs)
    in_tile = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for tile in range(begin // STEPS, tl.cdiv(end, STEPS)):
        first = tl.maximum(begin - tile * STEPS, 0)
        last = tl.minimum(end - tile * STEPS, STEPS)
        row = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        total, up = _tile_sums(
            x,
            weight,
            row,
            column,
            x_stride,
            weight_stride,
            num_rows,
            first,
            last,
            N,
            K,
            OUTPUTS,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            GATED,
        )
        whole = last - first == STEPS
        if not whole:
            total, up, whole = met(
                total, up, partials, counters, in_tile, tile, program, first, num_steps, num_programs, STEPS, GATED
            )
        if whole:
            rows, columns = row[:, None].to(tl.int64), column[None, :]
            inside = (rows < num_rows) & (columns < OUTPUTS)
            total = finished(total, up, bias, residual, rows, columns, inside, residual_stride, OUTPUTS, GATE)
            tl.store(out + rows * OUTPUTS + columns, total.to(out.dtype.element_ty), mask=inside)


def stream_k(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gate: str,
    choice: Choice,
) -> None:
    """Fills out [m, outputs]. Columns of x, weight and residual lie side by side."""
    tiles = triton.cdiv(len(x), choice.block_m) * triton.cdiv(out.shape[1], choice.block_n)
    num_programs = shared_by(x, tiles, triton.cdiv(weight.shape[1], choice.block_k), choice)
    tile_size = (2 if gate else 1) * choice.block_m * choice.block_n
    stream_k_kernel[(num_programs,)](
        out,
        x,
        weight,
        bias,
        residual,
        *room_to_meet(x, num_programs, tile_size),
        x.stride(0),
        weight.stride(0),
        0 if residual is None else residual.stride(0),
        len(x),
        N=weight.shape[0],
        K=weight.shape[1],
        BLOCK_M=choice.block_m,
        BLOCK_N=choice.block_n,
        BLOCK_K=choice.block_k,
        GATE=gate,
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )
