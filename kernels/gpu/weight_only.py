"""Products by weights of 4 or 8 bits with activations as they are: W4A16, W8A16, and E4M3 on any GPU.

Weights become x's dtype in registers and stay there: the product is made as (W x^T)^T, whose left side may come from
registers on Hopper too. Of few rows what is multiplied are the integers themselves, exactly, scaled once a group of
inputs; offsets then count by the sums of x over the group, for which the matrix units multiply by ones. Of many rows a
weight is scaled and rounded before it is multiplied, where a group would otherwise end too often.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.linear_parts import finished
from phalanx.kernels.gpu.linear_shares import met, room_to_meet, share_start, shared_by
from phalanx.kernels.linear_table import Choice

CHUNK = 64  # inputs whose weights of 4 bits lie together
NIBBLES = 4  # weights of 4 bits in a word


@triton.jit
def from_nibbles(words, number: tl.constexpr, dtype: tl.constexpr):
    """The weights of 4 bits at a place of each int16, as numbers of `dtype` that are `nibble_shift` too large: what is
    left of the point of a float that ends in them.
    """
    q = (words >> (4 * number)) & 0xF
    if dtype == tl.bfloat16:
        w = (q | 0x4300).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        w = (q | 0x6400).to(tl.float16, bitcast=True)
    else:
        w = q.to(dtype)
    return w


@triton.jit
def from_e4m3(bits, dtype: tl.constexpr):
    """Weights in E4M3, given as uint8, by integer arithmetic: sign, exponent and fraction moved to where the other
    format has them, subnormal numbers included, and multiplied by what lies between the biases. Exact.
    """
    wide = bits.to(tl.int16)
    sign, rest = (wide & 0x80) << 8, wide & 0x7F
    if dtype == tl.bfloat16:  # biases of 127 and 7: 2^120
        w = (sign | (rest << 4)).to(tl.bfloat16, bitcast=True) * tl.full((), 1.329227995784916e36, tl.float32).to(
            tl.bfloat16
        )
    else:  # of 15 and 7
        w = (sign | (rest << 7)).to(tl.float16, bitcast=True) * tl.full((), 256.0, tl.float32).to(tl.float16)
    return w.to(dtype)


@triton.jit
def _of_slice(scales, column, start, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, SLICE: tl.constexpr):
    """Scales, or offsets, of the weights of a slice of inputs: [BLOCK_N, 1], or [BLOCK_N, SLICE] where groups end
    within it.
    """
    at = start + tl.arange(0, 1 if GROUP % SLICE == 0 else SLICE)[None, :]
    inside = (column < N)[:, None] & (at < K)
    return tl.load(scales + (at // GROUP) * N + column[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tile_sums(
    x,
    weight,
    scales,
    offsets,
    row,
    column,
    x_stride,
    num_rows,
    first,
    last,
    N: tl.constexpr,
    K: tl.constexpr,
    W_STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    SLICE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] over the blocks of K from `first` to `last`."""
    dtype: tl.constexpr = x.dtype.element_ty
    GROUPED: tl.constexpr = GROUP < K
    # Whether something is added to each weight: then sums of x are wanted, unless it is added before the product.
    SUMMED: tl.constexpr = (not SCALED) and (SHIFT != 0.0 or offsets is not None)
    WHOLE_BLOCKS: tl.constexpr = K % BLOCK_K == 0 and N % BLOCK_N == 0
    outputs_inside = column < N
    rows_inside = row < num_rows
    x_rows = x + row.to(tl.int64)[:, None] * x_stride
    at = tl.arange(0, SLICE)[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    here = total
    sums = total
    ones = tl.full((BLOCK_N, SLICE), 1.0, tl.float32).to(dtype)
    for step in range(first, last):
        for span in tl.static_range(BLOCK_K // SPAN):
            if GROUPED and not SCALED:
                here = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                sums = here
            for number in tl.static_range(SPAN // SLICE):
                start = step * BLOCK_K + span * SPAN + number * SLICE
                if HELD == "int4":
                    if (
                        span * SPAN + number * SLICE
                    ) % 64 == 0:  # written out, or it is none of the compiler's constants
                        chunk = start // 64
                        place = (chunk.to(tl.int64) * N + column)[:, None] * SLICE + at
                        if WHOLE_BLOCKS:
                            words = tl.load(weight + place)
                        else:
                            words = tl.load(weight + place, mask=outputs_inside[:, None] & (start < K), other=0)
                    w = from_nibbles(words, (span * SPAN + number * SLICE) % 64 // SLICE, dtype)
                else:
                    place = weight + column.to(tl.int64)[:, None] * W_STRIDE + (start + at)
                    if WHOLE_BLOCKS:
                        q = tl.load(place)
                    else:
                        q = tl.load(place, mask=outputs_inside[:, None] & (start + at < K), other=0)
                    w = from_e4m3(q, dtype) if HELD == "fp8" else q.to(dtype)
                if SCALED:
                    scaled = (w.to(tl.float32) - SHIFT) * _of_slice(scales, column, start, N, K, GROUP, SLICE)
                    if offsets is not None:
                        scaled += _of_slice(offsets, column, start, N, K, GROUP, SLICE)
                    w = scaled.to(dtype)
                if K % BLOCK_K == 0:
                    part = tl.load(x_rows + (start + at), mask=rows_inside[:, None], other=0.0)
                else:
                    part = tl.load(x_rows + (start + at), mask=rows_inside[:, None] & (start + at < K), other=0.0)
                here = tl.dot(w, part.T, here, input_precision=PRECISION)
                if SUMMED:
                    sums = tl.dot(ones, part.T, sums, input_precision=PRECISION)
            if GROUPED and not SCALED:
                first_input = step * BLOCK_K + span * SPAN
                inside = outputs_inside & (first_input < K)
                place = (first_input // GROUP) * N + column
                scale = tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)[:, None]
                if SUMMED:
                    added = -SHIFT * scale
                    if offsets is not None:
                        added += tl.load(offsets + place, mask=inside, other=0.0).to(tl.float32)[:, None]
                    total += sums * added
                total += here * scale
    if not GROUPED and not SCALED:
        scale = tl.load(scales + column, mask=outputs_inside, other=0.0).to(tl.float32)[:, None]
        total = here * scale
        if SUMMED:
            added = -SHIFT * scale
            if offsets is not None:
                added += tl.load(offsets + column, mask=outputs_inside, other=0.0).to(tl.float32)[:, None]
            total += sums * added
    elif SCALED:
        total = here
    return total


@triton.jit(do_not_specialize=["num_rows"])
def weight_only_kernel(
    out,
    x,
    weight,
    scales,
    offsets,
    bias,
    partials,
    counters,
    x_stride,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    W_STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    SLICE: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """HELD: int4, int8 or fp8. SHIFT: what weights are too large by as they come out of their bits. GROUP: inputs that
    share a scale. SPAN: of them, those of one block. SLICE: inputs that are multiplied at a time. SCALED: whether
    weights are scaled before they are multiplied.
    """
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K  # of a tile
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    tiles_m = tl.cdiv(num_rows, BLOCK_M)
    num_steps = tiles_m * ((N + BLOCK_N - 1) // BLOCK_N) * STEPS
    begin = share_start(program, num_steps, num_programs)
    end = share_start(program + 1, num_steps, num_programs)
    in_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    for tile in range(begin // STEPS, tl.cdiv(end, STEPS)):
        first = tl.maximum(begin - tile * STEPS, 0)
        last = tl.minimum(end - tile * STEPS, STEPS)
        row = tile % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tile // tiles_m * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tile_sums(
            x,
            weight,
            scales,
            offsets,
            row,
            column,
            x_stride,
            num_rows,
            first,
            last,
            N,
            K,
            W_STRIDE,
            HELD,
            SHIFT,
            GROUP,
            SPAN,
            SLICE,
            SCALED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
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
            rows, columns = row[None, :].to(tl.int64), column[:, None]
            inside = (rows < num_rows) & (columns < N)
            total = finished(total, total, bias, None, rows, columns, inside, 0, N, "")
            tl.store(out + rows * N + columns, total.to(out.dtype.element_ty), mask=inside)


def weight_only(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    held: str,
    shift: float,
    group_size: int,
    choice: Choice,
) -> None:
    """Fills out [m, n]. x [m, k]: columns side by side. scales, offsets: [groups, n].

    weight: int8, or E4M3 as uint8, [n, k or more]; of 4 bits as `linear_w4a16.pack_int4` makes it. held, shift and
    group_size: as of the kernel.
    """
    num_rows, num_inputs = x.shape
    num_outputs = out.shape[1]
    block_m, block_n, block_k = choice.block_m, choice.block_n, choice.block_k
    few = choice.kernel == "stream_k"
    cuts = cuts_of(held, group_size, num_inputs, block_k, few=few)
    tiles = triton.cdiv(num_rows, block_m) * triton.cdiv(num_outputs, block_n)
    num_programs = shared_by(x, tiles, triton.cdiv(num_inputs, block_k), choice)
    weight_only_kernel[(num_programs,)](
        out,
        x,
        weight,
        scales,
        offsets,
        bias,
        *(room_to_meet(x, num_programs, block_m * block_n) if few else (None, None)),
        x.stride(0),
        num_rows,
        N=num_outputs,
        K=num_inputs,
        W_STRIDE=weight.stride(0),
        HELD=held,
        SHIFT=shift,
        GROUP=group_size,
        SPAN=cuts.span,
        SLICE=cuts.slice,
        SCALED=cuts.scaled,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=choice.num_warps,
        num_stages=choice.num_stages,
    )


class Cuts(NamedTuple):
    """Of a block of inputs: the constants of the kernel that are called so."""

    slice: int
    span: int
    scaled: bool


def cuts_of(held: str, group_size: int, num_inputs: int, block_k: int, *, few: bool) -> Cuts:
    """few: whether rows of x are."""
    smallest = CHUNK // NIBBLES
    span = math.gcd(group_size, block_k) if group_size < num_inputs else block_k
    scaled = span < smallest or (not few and (span < block_k or held == "int4"))
    if scaled:
        span = block_k
    return Cuts(smallest if held == "int4" else min(span, CHUNK), span, scaled)
