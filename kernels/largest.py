"""`argmax`, `argmax_keys`, `top`: the largest numbers of rows, as a shard of the vocabulary is searched."""

from __future__ import annotations

import math

import torch

from phalanx.kernels import native_cpu, triton_gpu

_LARGEST_INT32 = 2**31 - 1
_LOWER_BITS = 2**32 - 1


def argmax(values_BV: torch.Tensor) -> torch.Tensor:
    """The column of each row's largest number, [B] int64; the first of equals."""
    gpu = triton_gpu.operators_for(values_BV)
    if gpu is not None:
        return gpu.argmax(values_BV)  # type: ignore[no-any-return]
    if not _applies(values_BV):
        return values_BV.argmax(1)
    columns_B = torch.empty(values_BV.shape[0], dtype=torch.int64)
    code = native_cpu.FLOAT_CODES[values_BV.dtype]
    native_cpu.LIBRARY.argmax(columns_B.data_ptr(), values_BV.data_ptr(), *values_BV.shape, code)
    return columns_B


def argmax_keys(values_BV: torch.Tensor, first: int) -> torch.Tensor:
    """A key of each row's largest number, [B] int64, for rows that go on in the columns of other ranks, of float32 or
    less: of several keys the largest is that of the largest number, the first of equals. `columns_of_keys` reads the
    column.

    first: the column, among all, of the first one here; below 2^32 in all.
    """
    if _applies(values_BV):
        keys_B = torch.empty(values_BV.shape[0], dtype=torch.int64)
        code = native_cpu.FLOAT_CODES[values_BV.dtype]
        native_cpu.LIBRARY.argmax_keys(keys_B.data_ptr(), values_BV.data_ptr(), *values_BV.shape, first, code)
        return keys_B
    column_B1 = argmax(values_BV).unsqueeze(1)
    value_B = values_BV.gather(1, column_B1).squeeze(1).float()
    bits_B = (value_B + 0.0).view(torch.int32)  # adding zero makes both zeros one
    rank_B = torch.where(bits_B < 0, bits_B ^ _LARGEST_INT32, bits_B).masked_fill(value_B.isnan(), _LARGEST_INT32)
    return (rank_B.long() << 32) | (_LOWER_BITS - (column_B1.squeeze(1) + first))


def columns_of_keys(keys_B: torch.Tensor) -> torch.Tensor:
    """[B] int64."""
    return _LOWER_BITS - (keys_B & _LOWER_BITS)


def top(values_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and columns of the best `count` of each row, best first, equal ones in order of their columns. Without
    not-a-numbers. Where a row has fewer above minus infinity, the rest of its columns are any that are not.
    """
    gpu = triton_gpu.operators_for(values_BV)
    if gpu is not None:
        return gpu.top(values_BV, count)  # type: ignore[no-any-return]
    if not _applies(values_BV) or values_BV.dtype != torch.float32:
        return _top(values_BV, count)
    num_rows, width = values_BV.shape
    values_BK = values_BV.new_empty((num_rows, count))
    column_BK = torch.empty((num_rows, count), dtype=torch.int64)
    native_cpu.LIBRARY.top(values_BK.data_ptr(), column_BK.data_ptr(), values_BV.data_ptr(), num_rows, width, count)
    return values_BK, column_BK


def _applies(values_BV: torch.Tensor) -> bool:
    """Columns are counted in 32 bits."""
    is_float = native_cpu.code_of(values_BV) is not None
    return is_float and values_BV.is_contiguous() and 0 < values_BV.shape[1] < 2**31


def _top(values_BV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and columns of the best `count` of each row, best first, equal ones in order of their columns.

    `topk` leaves the choice among equals open, and bfloat16 logits are often equal. Rows where that choice matters are
    taken again: all columns at least as large as the least that belongs, in order. Which those are a GPU would have to
    tell the host first, so there the whole rows are sorted.
    """
    if not values_BV.is_cpu:
        values_BV, column_BV = values_BV.sort(dim=1, descending=True, stable=True)
        return values_BV[:, :count].contiguous(), column_BV[:, :count].contiguous()
    values_BK, column_BK = values_BV.topk(count, dim=1)
    least_B1 = values_BK[:, -1:]
    open_B = (values_BV == least_B1).sum(1) > (values_BK == least_B1).sum(1)
    again_R = (open_B & (least_B1.squeeze(1) > -math.inf)).nonzero().squeeze(1)
    column_BK = column_BK.sort(1).values
    if again_R.numel():
        column_BK[again_R] = _first_top(values_BV[again_R], least_B1[again_R], count)
    values_BK, order_BK = values_BV.gather(1, column_BK).sort(dim=1, descending=True, stable=True)
    return values_BK, column_BK.gather(1, order_BK)


def _first_top(values_BV: torch.Tensor, least_B1: torch.Tensor, count: int) -> torch.Tensor:
    """Columns, in order, of the entries above `least` and of the first of those equal to it: `count` in all."""
    above_BV = values_BV > least_B1
    equal_BV = values_BV == least_B1
    room_B1 = count - above_BV.sum(1, keepdim=True)
    belongs_BV = above_BV | (equal_BV & (equal_BV.cumsum(1) <= room_B1))
    return belongs_BV.nonzero()[:, 1].view(-1, count)
