"""The reading of part of a matrix as integers and scales, or as what they stand for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from phalanx.errors import ModelError
from phalanx.kernels import QuantisedRows, WeightFormat, dequantise, quantise
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.packed_matrix import PackedMatrix, Region
from phalanx.models.params import TensorSlice
from phalanx.models.scheme import Scheme
from phalanx.parallel.split import Interval

# Numbers at a time: few enough that no full copy of a matrix is held in full precision.
_AT_ONCE = 1 << 20


def weight_format(scheme: Scheme) -> WeightFormat:
    dtype = getattr(torch, scheme.scale_type)
    return WeightFormat(
        scheme.bits, scheme.group_size, dtype, scheme.offsets, scheme.zeros, scheme.e4m3, scheme.activations
    )


class HeldInputs(NamedTuple):
    """How the inputs of a rank's part of a matrix are held.

    groups: [held groups], the group of the whole matrix whose scales each has. order: as `QuantisedWeight` takes it.
    """

    groups: torch.Tensor
    order: torch.Tensor | None = None


def held_inputs(
    checkpoint: Checkpoint, pieces: Sequence[TensorSlice], scheme: Scheme, held: WeightFormat, *, stored: bool
) -> HeldInputs:
    """Of a matrix that is stacked of `pieces`. stored: whether the checkpoint has them in `scheme`. Raises ModelError
    where their groups are scattered differently.
    """
    found = [_held_inputs(checkpoint, piece, scheme, held, stored=stored) for piece in pieces]
    for piece, each in zip(pieces, found, strict=True):
        if not _same(each.order, found[0].order) or not torch.equal(each.groups, found[0].groups):
            raise ModelError(
                f"the groups of {pieces[0].tensor} and {piece.tensor} are scattered over the inputs in two ways (g_idx,"
                " act-order), and one product reads both; set model.quantization: none"
            )
    return found[0]


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _held_inputs(
    checkpoint: Checkpoint, piece: TensorSlice, scheme: Scheme, held: WeightFormat, *, stored: bool
) -> HeldInputs:
    region = _region(checkpoint, piece)
    columns = region.columns
    if scheme.group_size is None or held.group_size is None:
        return HeldInputs(torch.zeros(1, dtype=torch.int64))
    groups = torch.arange(columns.start, columns.stop) // scheme.group_size
    if stored and checkpoint.entry(piece.tensor).packing is not None:
        scattered = PackedMatrix(checkpoint, piece.tensor, region).groups_of_inputs()
        if scattered is not None:
            groups = scattered[columns.slice]
    size = held.group_size
    firsts = groups[::size]
    if torch.equal(firsts.repeat_interleave(size)[: len(groups)], groups):
        return HeldInputs(firsts)
    order, of_held = [], []
    for group in sorted(set(groups.tolist())):
        members = (groups == group).nonzero().flatten()
        num_groups = -(-len(members) // size)
        order.append(torch.cat([members, torch.full((num_groups * size - len(members),), -1)]))
        of_held += [group] * num_groups
    return HeldInputs(torch.tensor(of_held), torch.cat(order))


def quantised_slice(
    checkpoint: Checkpoint,
    piece: TensorSlice,
    scheme: Scheme,
    inputs: HeldInputs,
    device: torch.device,
    *,
    stored: bool,
) -> Iterator[QuantisedRows]:
    """Rows of a slice, some at a time, with its inputs held as `inputs` says; as the whole matrix has them in `scheme`.

    stored: whether the checkpoint has them so; else they are quantised here, on `device`. Raises as `Checkpoint.read`.
    """
    region = _region(checkpoint, piece)
    if stored and checkpoint.entry(piece.tensor).packing is not None:
        yield from _packed_rows(checkpoint, piece, region, inputs)
        return
    columns, width = region.columns, checkpoint.entry(piece.tensor).shape[1]
    around = Interval(0, width)
    if scheme.group_size is not None:
        group = scheme.group_size
        around = Interval(columns.start // group * group, min(-(-columns.stop // group) * group, width))
    inside = slice(columns.start - around.start, columns.stop - around.start)
    first_group = 0 if scheme.group_size is None else around.start // scheme.group_size
    groups = inputs.groups - first_group
    for some in _chunks(checkpoint, piece, region.rows):
        if stored:
            found = _unpacked(checkpoint.read_blocks(piece.tensor, some, around), scheme)
        else:
            values = read_values(checkpoint, piece.tensor, some, around, torch.float32)
            found = quantise(values.to(device), weight_format(scheme))
        offsets = None if found.offsets is None else found.offsets[:, groups]
        yield QuantisedRows(_in_order(found.q[:, inside], inputs), found.scales[:, groups], offsets)


def read_values(
    checkpoint: Checkpoint, name: str, rows: Interval | None, columns: Interval | None, dtype: torch.dtype
) -> torch.Tensor:
    """As `Checkpoint.read`; of a packed matrix what its integers stand for."""
    entry = checkpoint.entry(name)
    if entry.packing is None:
        return checkpoint.read(name, rows, columns, dtype)
    # Each input with a scale of its own, as it is in its place whatever the group it belongs to.
    scheme = entry.packing.scheme
    one_by_one = weight_format(scheme)._replace(group_size=None if scheme.group_size is None else 1)
    piece = TensorSlice(name, (), rows, columns)
    region = _region(checkpoint, piece)
    inputs = _held_inputs(checkpoint, piece, scheme, one_by_one, stored=True)
    result = torch.empty(region.rows.size, region.columns.size, dtype=dtype)
    first = 0
    for some in _packed_rows(checkpoint, piece, region, inputs):
        values = dequantise(some, one_by_one)
        result[first : first + len(values)] = values
        first += len(values)
    return result


def _packed_rows(
    checkpoint: Checkpoint, piece: TensorSlice, region: Region, inputs: HeldInputs
) -> Iterator[QuantisedRows]:
    matrix = PackedMatrix(checkpoint, piece.tensor, region)
    groups = Interval(int(inputs.groups.min()), int(inputs.groups.max()) + 1)
    of_held = inputs.groups - groups.start
    for some in _chunks(checkpoint, piece, region.rows):
        q, heads = _in_order(matrix.integers(some), inputs), matrix.heads(some, groups)
        zeros = None if heads.zeros is None else heads.zeros[:, of_held]
        yield QuantisedRows(q, heads.scales[:, of_held], None, zeros)


def _in_order(q: torch.Tensor, inputs: HeldInputs) -> torch.Tensor:
    """As they are held. Where there is no input it is any number: it is multiplied by zero."""
    return q if inputs.order is None else q[:, inputs.order.clamp(min=0)]


def _region(checkpoint: Checkpoint, piece: TensorSlice) -> Region:
    num_rows, width = checkpoint.entry(piece.tensor).shape
    return Region(piece.rows or Interval(0, num_rows), piece.columns or Interval(0, width))


def _chunks(checkpoint: Checkpoint, piece: TensorSlice, rows: Interval) -> Iterator[Interval]:
    """Rows in turns: whole blocks of 32 outputs, and whole heads where the file has their rows in another order."""
    entry = checkpoint.entry(piece.tensor)
    block = math.lcm(32, entry.interleaved_head_dim or 1)
    step = max(1, _AT_ONCE // entry.shape[1] // block) * block
    return (Interval(first, min(first + step, rows.stop)) for first in range(rows.start, rows.stop, step))


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
