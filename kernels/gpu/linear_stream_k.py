"""Products of few rows: every program reads an equal share of the weights, wherever tiles begin and end (Osama et al.
2023, "Stream-K", arXiv 2301.03598).

Where a tile is cut between programs each leaves its part of the sum, and the one that comes last adds the parts in
order: the same numbers each time, whoever that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.linear_parts import MAX_TILES, counters_of, finished
from phalanx.kernels.gpu.target import target_of
from phalanx.kernels.linear_table import Choice


@triton.jit
def _owner(step, num_steps, num_programs):
    """The program whose share has this step."""
    return (((step + 1) * num_programs.to(tl.int64) - 1) // num_steps).to(tl.int32)


@triton.jit
def _share_start(program, num_steps, num_programs):
    return (program * num_steps.to(tl.int64) // num_programs).to(tl.int32)


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
    TILE: tl.constexpr = BLOCK_M * BLOCK_N
    HALVES: tl.constexpr = 2 if GATED else 1
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    num_steps = tiles_m * ((OUTPUTS + BLOCK_N - 1) // BLOCK_N) * STEPS
    begin = _share_start(program, num_steps, num_programs)
    end = _share_start(program + 1, num_steps, num_programs)
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
            # A program has at most two parts of tiles: one that it ends, and one that it begins.
            slot = (program * 2 + tl.where(first == 0, 1, 0)).to(tl.int64) * HALVES * TILE
            tl.store(partials + slot + in_tile, total)
            if GATED:
                tl.store(partials + slot + TILE + in_tile, up)
            tl.debug_barrier()  # all threads have written before one tells
            first_owner = _owner(tile * STEPS, num_steps, num_programs)
            last_owner = _owner(tile * STEPS + STEPS - 1, num_steps, num_programs)
            arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
            if arrived == last_owner - first_owner:
                total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED else total
                for owner in range(first_owner, last_owner + 1):
                    slot = (owner * 2 + tl.where(owner == first_owner, 1, 0)).to(tl.int64) * HALVES * TILE
                    total += tl.load(partials + slot + in_tile, cache_modifier=".cg")
                    if GATED:
                        up += tl.load(partials + slot + TILE + in_tile, cache_modifier=".cg")
                tl.store(counters + tile, 0)
                whole = True
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
    if tiles > MAX_TILES:
        raise ValueError(f"{tiles} tiles in a product of few rows; {MAX_TILES} is the most: take larger ones")
    steps = tiles * triton.cdiv(weight.shape[1], choice.block_k)
    num_programs = min(steps, choice.per_sm * target_of(x).num_sms)
    size = 2 * num_programs * (2 if gate else 1) * choice.block_m * choice.block_n
    partials = torch.empty(size, dtype=torch.float32, device=x.device)
    stream_k_kernel[(num_programs,)](
        out,
        x,
        weight,
        bias,
        residual,
        partials,
        counters_of(x),
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
