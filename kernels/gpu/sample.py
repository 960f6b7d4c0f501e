"""`sample`: tokens drawn from logits without a word to the host (Gumbel 1954; Holtzman et al. 2019, arXiv 1904.09751).

Rows that are not cut are drawn from as they are read. Of rows that top_k or top_p cut, the best `FIRST` entries are
found and drawn from; where top_p asks for more than these, which the row's own program finds out, it searches the
threshold bit by bit, in some 50 passes over its row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.draw_parts import gumbel, highest_cut, keys_at, mass_above, scaled_at
from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.largest import best_of_lanes, best_of_parts, parts_of, top
from phalanx.kernels.gpu.operator import operator

FIRST = 256  # entries of a row that are put in order
_BLOCK = 1024  # columns taken at a time
_OPEN = -1  # in the place of a token that is still to be drawn


@triton.jit
def _row_scale(temperature, min_p, best):
    """(temperature, floor, top) of a row: what its logits are divided by, the least that stays, and the largest."""
    given = tl.load(temperature)
    scale = tl.where(given > 0, given, 1.0)
    largest = tl.load(best).to(tl.float64) / scale
    share = tl.load(min_p)
    floor = tl.where(share > 0, largest + tl.log(tl.where(share > 0, share, 1.0)), float("-inf"))
    return scale, floor, largest


@triton.jit
def _draw_part_kernel(
    values,
    columns,
    sums,
    logits,
    best,
    best_stride,
    temperature,
    min_p,
    seed,
    position,
    logits_stride,
    width,
    part_width,
    BLOCK: tl.constexpr,
):
    """A program a part of a row: its draw from all that min_p leaves, and the mass of that over the row's largest."""
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    given = tl.load(temperature + row)
    scale, floor, largest = _row_scale(temperature + row, min_p + row, best + row * best_stride)
    lane = tl.arange(0, BLOCK)
    start = part * part_width
    drawn = tl.full((BLOCK,), float("-inf"), tl.float64)
    where = start + lane
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(start, tl.minimum(start + part_width, width), BLOCK):
        column = begin + lane
        value = scaled_at(logits + row * logits_stride, column, width, scale, floor)
        total += tl.exp(value - largest)
        if given > 0:
            value += gumbel(tl.load(seed + row), tl.load(position + row), column.to(tl.int64))
        better = value > drawn
        drawn, where = tl.where(better, value, drawn), tl.where(better, column, where)
    value, column = best_of_lanes(drawn, where)
    at = row * num_parts + part
    tl.store(values + at, value)
    tl.store(columns + at, column)
    tl.store(sums + at, tl.sum(total, 0))


@triton.jit
def _draw_from_best_kernel(
    tokens,
    best,
    best_columns,
    sums,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    width,
    num_parts,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    OPEN: tl.constexpr,
):
    """A program a row: a draw from its best, if it is cut, and `OPEN` where these are too few."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    if (tl.load(temperature + row) > 0) & ((k > 0) | (p < 1)):
        scale, floor, largest = _row_scale(temperature + row, min_p + row, best + row * COUNT)
        value = scaled_at(best + row * COUNT, at, COUNT, scale, floor)
        value = tl.where((k > 0) & (at >= k), float("-inf"), value)
        mass = tl.exp(value - largest)
        found = tl.sum(mass, 0)
        part = tl.arange(0, PARTS)
        whole = tl.sum(tl.load(sums + row * num_parts + part, mask=part < num_parts, other=0.0), 0)
        total = tl.where(k > 0, found, whole)
        enough = (width == COUNT) | ((k > 0) & (k <= COUNT)) | ((k == 0) & (found >= p * total))
        before = tl.cumsum(mass, 0) - mass
        most = tl.where(p < 1, p * total, float("inf"))
        value = tl.where((before >= most) & (at > 0), float("-inf"), value)
        column = tl.load(best_columns + row * COUNT + at, mask=at < COUNT, other=0)
        drawn = value + gumbel(tl.load(seed + row), tl.load(position + row), column)
        token = best_of_lanes(drawn, column)[1]
        tl.store(tokens + row, tl.where(enough, token, OPEN))


@triton.jit
def _search_kernel(
    tokens,
    logits,
    best,
    best_stride,
    temperature,
    top_k,
    top_p,
    min_p,
    seed,
    position,
    logits_stride,
    width,
    COLUMN_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OPEN: tl.constexpr,
):
    """A program a row, which returns at once where the token is drawn."""
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    if tl.load(tokens + row) == OPEN:
        scale, floor, largest = _row_scale(temperature + row, min_p + row, best + row * best_stride)
        here = logits + row * logits_stride
        k, p = tl.load(top_k + row), tl.load(top_p + row)
        cut = tl.full((), -(1 << 63), tl.int64)
        if k > 0:
            cut = highest_cut(
                here, width, tl.minimum(k, width).to(tl.float64), scale, floor, largest, True, COLUMN_BITS, BLOCK
            )
        if p < 1:
            least = p * mass_above(here, width, cut, scale, floor, largest, False, COLUMN_BITS, BLOCK)
            cut = tl.maximum(cut, highest_cut(here, width, least, scale, floor, largest, False, COLUMN_BITS, BLOCK))
        drawn = tl.full((BLOCK,), float("-inf"), tl.float64)
        where = lane
        for begin in range(0, width, BLOCK):
            column = begin + lane
            value = scaled_at(here, column, width, scale, floor)
            key = keys_at(here, column, width, COLUMN_BITS)
            value += gumbel(tl.load(seed + row), tl.load(position + row), column.to(tl.int64))
            better = (key >= cut) & (value > drawn)
            drawn, where = tl.where(better, value, drawn), tl.where(better, column, where)
        tl.store(tokens + row, best_of_lanes(drawn, where)[1])


def _fake(
    logits_BV: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    return logits_BV.new_empty(logits_BV.shape[0], dtype=torch.int64)


@operator(fake=_fake)
def sample(
    logits_BV: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seed: torch.Tensor,
    position: torch.Tensor,
) -> torch.Tensor:
    """As `phalanx.kernels.sample`, which calls it. [B] each but the logits, contiguous."""
    if not logits_BV.numel():
        return _fake(logits_BV, temperature, top_k, top_p, min_p, seed, position)
    logits = logits_BV if logits_BV.stride(1) == 1 else logits_BV.contiguous()
    num_rows, width = logits.shape
    best, best_columns = top(logits, min(FIRST, width))
    count = best.shape[1]
    num_parts, part_width = parts_of(logits)
    values, sums = logits.new_empty((2, num_rows, num_parts), dtype=torch.float64)
    columns = logits.new_empty((num_rows, num_parts), dtype=torch.int32)
    _draw_part_kernel[(num_rows, num_parts)](
        values,
        columns,
        sums,
        logits,
        best,
        count,
        temperature,
        min_p,
        seed,
        position,
        logits.stride(0),
        width,
        part_width,
        BLOCK=_BLOCK,
        num_warps=8,
    )
    tokens = best_of_parts(values, columns)[1]
    _draw_from_best_kernel[(num_rows,)](
        tokens,
        best,
        best_columns,
        sums,
        temperature,
        top_k,
        top_p,
        min_p,
        seed,
        position,
        width,
        num_parts,
        COUNT=count,
        BLOCK=triton.next_power_of_2(count),
        PARTS=triton.next_power_of_2(num_parts),
        OPEN=_OPEN,
        num_warps=4,
    )
    if count < width:
        _search_kernel[(num_rows,)](
            tokens,
            logits,
            best,
            count,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            position,
            logits.stride(0),
            width,
            COLUMN_BITS=width.bit_length(),
            BLOCK=_BLOCK,
            OPEN=_OPEN,
            num_warps=8,
        )
    return tokens


def _example() -> torch.Tensor:
    wide, whole = meta(8, dtype=torch.float64), meta(8, dtype=torch.int64)
    return sample(meta(8, 128256, dtype=torch.float32), wide, whole, wide, wide, whole, whole)


EXAMPLES = (Example("8 rows of 128256", _example),)
