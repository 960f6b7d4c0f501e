"""`argmax`, `top`: the largest numbers of rows, the first of equals first.

`top` is a tournament: of each chunk of a row the best go on, until one chunk holds all that are left. What is compared
is one whole number for value and column together, so that no two are equal.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.target import target_of

_KEPT = (64, 256, 1024)  # entries of a chunk that go on: few sizes, since each is compiled
MOST = _KEPT[-1]  # entries that `top` finds by a tournament
_CHUNK = 4096
_BLOCK = 1024  # columns taken at a time
_LEAST_COLUMNS = 4096  # of a program
_PROGRAMS_PER_SM = 4


@triton.jit
def key_of(values, column, LAST: tl.constexpr):
    """Values, float32, and columns up to `LAST` as numbers in order of the values, equal ones in falling order of
    columns.
    """
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # of -0 and 0 the same
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return (ordered << 32) | (LAST - column).to(tl.int64)


@triton.jit
def best_of_lanes(best, where):
    """(value, column) of the largest of a block, the lowest column of equals."""
    value = tl.max(best, 0)
    return value, tl.min(tl.where(best == value, where, 0x7FFFFFFF), 0)


@triton.jit
def _argmax_kernel(values, columns, x, x_stride, width, part_width, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """A program a part of a row."""
    row, part, num_parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start = part * part_width
    lane = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float64 if WIDE else tl.float32)
    where = start + lane
    for begin in range(start, tl.minimum(start + part_width, width), BLOCK):
        column = begin + lane
        value = tl.load(x + row * x_stride + column, mask=column < width, other=float("-inf")).to(best.dtype)
        better = value > best
        best, where = tl.where(better, value, best), tl.where(better, column, where)
    value, column = best_of_lanes(best, where)
    tl.store(values + row * num_parts + part, value)
    tl.store(columns + row * num_parts + part, column)


@triton.jit
def best_of_parts_kernel(value, column, values, columns, num_parts, BLOCK: tl.constexpr):
    """A program a row, of whose parts the best are known. num_parts: `BLOCK` at most."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = part < num_parts
    best = tl.load(values + row * num_parts + part, mask=inside, other=float("-inf"))
    where = tl.load(columns + row * num_parts + part, mask=inside, other=0x7FFFFFFF)
    best_value, best_column = best_of_lanes(best, where)
    tl.store(value + row, best_value)
    tl.store(column + row, best_column)


@triton.jit
def _keep_best(kept, key, KEPT: tl.constexpr):
    """Stores the `KEPT` largest of a block of keys, in no order. The least of them is found bit by bit."""
    one, lowest = tl.full((), 1, tl.int64), tl.full((), -(1 << 63), tl.int64)
    found = tl.full((), 0, tl.int64)
    count = tl.full((), key.shape[0], tl.int32)
    bit = 63
    while (bit >= 0) & (count > KEPT):
        tried = found | (one << bit)
        above = tl.sum((key >= (tried ^ lowest)).to(tl.int32), 0)
        found, count = tl.where(above >= KEPT, tried, found), tl.where(above >= KEPT, above, count)
        bit -= 1
    belongs = key >= (found ^ lowest)
    place = tl.cumsum(belongs.to(tl.int32), 0) - 1
    tl.store(kept + place, key, mask=belongs & (place < KEPT))


@triton.jit
def _first_round_kernel(keys, x, x_stride, width, CHUNK: tl.constexpr, KEPT: tl.constexpr):
    """A program a chunk of a row."""
    row, chunk, num_chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(x + row * x_stride + column, mask=column < width, other=0.0).to(tl.float32)
    key = tl.where(column < width, key_of(value, column, 0x7FFFFFFF), -(1 << 63))
    _keep_best(keys + (row * num_chunks + chunk) * KEPT, key, KEPT)


@triton.jit
def _next_round_kernel(kept, keys, width, CHUNK: tl.constexpr, KEPT: tl.constexpr):
    row, chunk, num_chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    key = tl.load(keys + row * width + at, mask=at < width, other=-(1 << 63))
    _keep_best(kept + (row * num_chunks + chunk) * KEPT, key, KEPT)


@triton.jit
def _in_order_kernel(values, columns, keys, count, KEPT: tl.constexpr, BLOCK: tl.constexpr):
    """A program some entries of a row's best: what they were made of, each where as many as are larger come before."""
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + row * KEPT + at)
    place = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, KEPT, BLOCK):
        other = tl.load(keys + row * KEPT + begin + tl.arange(0, BLOCK))
        place += tl.sum((other[None, :] > key[:, None]).to(tl.int32), 1)
    ordered = (key >> 32).to(tl.int32)
    bits = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    value = bits.to(tl.float32, bitcast=True).to(values.dtype.element_ty)
    tl.store(values + row * count + place, value, mask=place < count)
    tl.store(columns + row * count + place, 0x7FFFFFFF - (key & 0x7FFFFFFF), mask=place < count)


def parts_of(x_BV: torch.Tensor) -> tuple[int, int]:
    """(number, columns of each) of the parts of rows, so that all of the GPU has work, and no part is too small."""
    num_rows, width = x_BV.shape
    wanted = max(1, _PROGRAMS_PER_SM * target_of(x_BV).num_sms // num_rows)
    part_width = max(_LEAST_COLUMNS, triton.cdiv(triton.cdiv(width, wanted), _BLOCK) * _BLOCK)
    return triton.cdiv(width, part_width), part_width


def best_of_parts(values: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(value, column) of each row, [B], column int64, of those of its parts, [B, parts]."""
    num_rows, num_parts = values.shape
    value = values.new_empty(num_rows)
    column = torch.empty(num_rows, dtype=torch.int64, device=values.device)
    block = triton.next_power_of_2(num_parts)
    best_of_parts_kernel[(num_rows,)](value, column, values, columns, num_parts, BLOCK=block, num_warps=1)
    return value, column


def _fake_argmax(values_BV: torch.Tensor) -> torch.Tensor:
    return values_BV.new_empty(values_BV.shape[0], dtype=torch.int64)


@operator(fake=_fake_argmax)
def argmax(values_BV: torch.Tensor) -> torch.Tensor:
    """As `phalanx.kernels.argmax`, which calls it; so for `top`."""
    if not values_BV.numel():
        return _fake_argmax(values_BV)
    x = values_BV if values_BV.stride(1) == 1 else values_BV.contiguous()
    num_parts, part_width = parts_of(x)
    wide = x.dtype == torch.float64
    values = x.new_empty((len(x), num_parts), dtype=x.dtype if wide else torch.float32)
    columns = x.new_empty((len(x), num_parts), dtype=torch.int32)
    _argmax_kernel[(len(x), num_parts)](
        values, columns, x, x.stride(0), x.shape[1], part_width, WIDE=wide, BLOCK=_BLOCK, num_warps=4
    )
    return best_of_parts(values, columns)[1]


def _fake_top(values_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = values_BV.shape[0], count
    return values_BV.new_empty(shape), values_BV.new_empty(shape, dtype=torch.int64)


@operator(fake=_fake_top)
def top(values_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    if count > MOST or values_BV.dtype == torch.float64:
        found = values_BV.sort(dim=1, descending=True, stable=True)
        return found.values[:, :count].contiguous(), found.indices[:, :count].contiguous()
    values, columns = _fake_top(values_BV, count)
    if not values.numel():
        return values, columns
    x = values_BV if values_BV.stride(1) == 1 else values_BV.contiguous()
    num_rows, width = x.shape
    kept = next(size for size in _KEPT if size >= count)
    num_chunks = triton.cdiv(width, _CHUNK)
    keys = x.new_empty((num_rows, num_chunks * kept), dtype=torch.int64)
    _first_round_kernel[(num_rows, num_chunks)](keys, x, x.stride(0), width, CHUNK=_CHUNK, KEPT=kept, num_warps=8)
    while num_chunks > 1:
        num_chunks = triton.cdiv(keys.shape[1], _CHUNK)
        better = keys.new_empty((num_rows, num_chunks * kept))
        _next_round_kernel[(num_rows, num_chunks)](better, keys, keys.shape[1], CHUNK=_CHUNK, KEPT=kept, num_warps=8)
        keys = better
    _in_order_kernel[(num_rows, kept // _KEPT[0])](values, columns, keys, count, KEPT=kept, BLOCK=_KEPT[0], num_warps=4)
    return values, columns


EXAMPLES = (  # `top` is compiled with sample
    Example("argmax fp32 128256", lambda: argmax(meta(8, 128256, dtype=torch.float32))),
    Example("argmax bf16 128256", lambda: argmax(meta(8, 128256))),
)
