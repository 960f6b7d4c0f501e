"""The reading of part of a matrix as integers and scales."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from phalanx.kernels import QuantisedRows, WeightFormat, quantise
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.params import TensorSlice
from phalanx.models.quantization import Scheme
from phalanx.parallel.split import Interval

# Numbers at a time: few enough that no full copy of a matrix is held in full precision.
_AT_ONCE = 1 << 20

_SCALE_DTYPES = {2: torch.float16, 4: torch.float32}


def weight_format(scheme: Scheme) -> WeightFormat:
    scale_dtype = _SCALE_DTYPES[scheme.scale_bytes]
    return WeightFormat(
        scheme.bits, scheme.group_size, scale_dtype, scheme.offsets, scheme.floating, scheme.activations
    )


def quantised_slice(
    checkpoint: Checkpoint,
    piece: TensorSlice,
    scheme: Scheme,
    held: WeightFormat,
    device: torch.device,
    *,
    stored: bool,
) -> Iterator[QuantisedRows]:
    """Rows of a slice, some at a time, in the format `held`; as the whole matrix has them in `scheme`.

    stored: whether the checkpoint has them so; else they are quantised here, on `device`. Raises as `Checkpoint.read`.
    """
    entry = checkpoint.entry(piece.tensor)
    width = entry.shape[1]
    columns = piece.columns or Interval(0, width)
    around = Interval(0, width)
    if scheme.group_size is not None:
        group = scheme.group_size
        around = Interval(columns.start // group * group, min(-(-columns.stop // group) * group, width))
    inside = Interval(columns.start - around.start, columns.stop - around.start)
    rows = piece.rows or Interval(0, entry.shape[0])
    # Whole blocks of 32 outputs, and whole heads where the file has their rows in another order.
    block = math.lcm(32, entry.interleaved_head_dim or 1)
    step = max(1, _AT_ONCE // width // block) * block
    for first in range(rows.start, rows.stop, step):
        some = Interval(first, min(first + step, rows.stop))
        if stored:
            found = _unpacked(checkpoint.read_blocks(piece.tensor, some, around), scheme)
        else:
            found = quantise(
                checkpoint.read(piece.tensor, some, around, torch.float32).to(device), weight_format(scheme)
            )
        yield _cut(found, scheme, held, inside)


def _unpacked(blocks: torch.Tensor, scheme: Scheme) -> QuantisedRows:
    """blocks [R, groups, bytes], as ggml has them (ggml-common.h): the scale and, where there is one, the offset in
    float16, then the integers; of 4 bits the first half of the group in the low halves of bytes, the second in the high
    ones, with offsets from 0 and else from -8 on.
    """
    heads = 2 * (1 + scheme.offsets)
    scales = blocks[:, :, :heads].contiguous().view(torch.float16)
    packed = blocks[:, :, heads:]
    if scheme.bits == 8:
        q = packed.view(torch.int8)
    else:
        q = torch.cat([packed & 0xF, packed >> 4], -1).view(torch.int8)
        if not scheme.offsets:
            q = q - 8
    return QuantisedRows(q.flatten(1), scales[:, :, 0], scales[:, :, 1] if scheme.offsets else None)


def _cut(rows: QuantisedRows, scheme: Scheme, held: WeightFormat, columns: Interval) -> QuantisedRows:
    """Columns of rows, in groups that are as long as the scheme's or shorter."""
    q = rows.q[:, columns.slice]
    if scheme.group_size is None or held.group_size is None:
        return QuantisedRows(q, rows.scales, rows.offsets)
    times, first = scheme.group_size // held.group_size, columns.start // held.group_size
    groups = slice(first, first + held.num_groups(columns.size))

    def finer(scales: torch.Tensor) -> torch.Tensor:
        return scales.repeat_interleave(times, 1)[:, groups]

    return QuantisedRows(q, finer(rows.scales), None if rows.offsets is None else finer(rows.offsets))
