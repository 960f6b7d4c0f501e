"""The reading of the slices of a checkpoint that a rank holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from phalanx.kernels import (
    Experts,
    PackedExperts,
    PackedWeight,
    QuantisedRows,
    QuantisedWeight,
    Weight,
    WeightFormat,
    make_packed,
    make_quantised,
    quantise,
)
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.params import Param, TensorSlice
from phalanx.models.quantization import Scheme
from phalanx.parallel.split import Interval

# Quantised at a time: few enough that no full copy of a matrix is held in full precision.
_QUANTISED_VALUES = 1 << 20

_SCALE_DTYPES = {2: torch.float16, 4: torch.float32}


def load_params(
    params: list[Param],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool = False,
    quantised: Scheme | None = None,
    num_threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Reads the parameters as `dtype` onto `device`, several at a time. `on_bytes` hears each one's size when it is
    there.

    packed: matrices of products as `PackedWeight`s, where `kernels.choose_packing` finds them usable. quantised: as
    `QuantisedWeight`s instead, routers apart; what an output or a group of inputs is quantised by does not depend on
    how the matrix is cut. All others are tensors. Those of experts are `kernels.Experts`.
    """

    places: dict[str, PackedExperts] = {}

    def place(held: Sequence[Param], make: Callable[[list[Sequence[int]]], Sequence[Weight]]) -> None:
        """In one piece of memory."""
        rooms = iter(make([param.shape[-2:] for param in held for _ in param.matrices]) if held else [])
        places.update((param.name, PackedExperts(islice(rooms, len(param.matrices)))) for param in held)

    multiplied = [param for param in params if param.multiplied]
    if packed:
        place([param for param in multiplied if quantised is None or not param.quantisable], make_packed)
    if quantised is not None:
        some = [param for param in multiplied if param.quantisable]
        formats = [_format(quantised.of_cut(param)) for param in some for _ in param.matrices]
        place(some, lambda shapes: make_quantised(shapes, formats, dtype))

    def load(param: Param) -> Weight | Experts:
        held = places.get(param.name)
        if held is not None:
            for weight, pieces in zip(held, param.matrices, strict=True):
                fill(weight, pieces)
            return held if param.num_experts else held[0]
        tensor = torch.empty(param.shape, dtype=dtype, device=device)
        for part, pieces in zip(tensor if param.num_experts else [tensor], param.matrices, strict=True):
            fill(part, pieces)
        return tensor

    def fill(weight: Weight, pieces: tuple[TensorSlice, ...]) -> None:
        first = 0
        for piece in pieces:
            if isinstance(weight, QuantisedWeight):
                assert quantised is not None
                for rows in _quantised_rows(checkpoint, piece, _format(quantised), weight.format):
                    weight.put(first, rows)
                    first += len(rows.q)
                continue
            read = checkpoint.read(piece.tensor, piece.rows, piece.columns, dtype)
            if isinstance(weight, PackedWeight):
                weight.put(first, read)
            else:
                weight[first : first + len(read)] = read
            first += len(read)

    loaded = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for param, weight in zip(params, pool.map(load, params), strict=True):
            loaded[param.name] = weight
            if on_bytes is not None:
                on_bytes(param.num_elements * dtype.itemsize)
    return loaded


def _format(scheme: Scheme) -> WeightFormat:
    return WeightFormat(scheme.bits, scheme.group_size, _SCALE_DTYPES[scheme.scale_bytes])


def _quantised_rows(
    checkpoint: Checkpoint, piece: TensorSlice, whole: WeightFormat, held: WeightFormat
) -> Iterator[QuantisedRows]:
    """Rows of a slice, quantised as the rows of the whole matrix are."""
    known = piece.tensor in checkpoint.entries  # else reading says what is wrong
    shape = checkpoint.entries[piece.tensor].shape if known else piece.shape
    columns = piece.columns or Interval(0, shape[1])
    around = Interval(0, shape[1])
    if whole.group_size is not None:
        group = whole.group_size
        around = Interval(columns.start // group * group, min(-(-columns.stop // group) * group, shape[1]))
    rows = piece.rows or Interval(0, shape[0])
    # Whole blocks of 32 outputs, and whole heads where the file has their rows in another order.
    block = math.lcm(32, checkpoint.entries[piece.tensor].interleaved_head_dim or 1) if known else 32
    step = max(1, _QUANTISED_VALUES // shape[1] // block) * block
    for first in range(rows.start, rows.stop, step):
        some = Interval(first, min(first + step, rows.stop))
        found = quantise(checkpoint.read(piece.tensor, some, around, torch.float32), whole)
        yield _cut(found, whole, held, Interval(columns.start - around.start, columns.stop - around.start))


def _cut(rows: QuantisedRows, whole: WeightFormat, held: WeightFormat, columns: Interval) -> QuantisedRows:
    """Columns of rows in the format `whole`, in the format `held`, whose groups are as long or shorter."""
    q = rows.q[:, columns.slice]
    if whole.group_size is None or held.group_size is None:
        return QuantisedRows(q, rows.scales)
    finer = rows.scales.repeat_interleave(whole.group_size // held.group_size, 1)
    first = columns.start // held.group_size
    return QuantisedRows(q, finer[:, first : first + held.num_groups(columns.size)])
