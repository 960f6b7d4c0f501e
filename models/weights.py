"""The reading of the slices of a checkpoint that a rank holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from phalanx.kernels import Experts, PackedExperts, PackedWeight, Weight, make_packed
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.params import Param, TensorSlice


def load_params(
    params: list[Param],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool = False,
    num_threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Reads the parameters as `dtype` onto `device`, several at a time. `on_bytes` hears each one's size when it is
    there.

    packed: matrices of products as `PackedWeight`s, where `kernels.choose_packing` finds them usable. All others are
    tensors. Those of experts are `kernels.Experts`.
    """

    multiplied = [param for param in params if packed and param.multiplied]
    shapes = [param.shape[-2:] for param in multiplied for _ in param.matrices]
    rooms = iter(make_packed(shapes) if shapes else [])
    places = {param.name: PackedExperts(islice(rooms, len(param.matrices))) for param in multiplied}

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
            rows = checkpoint.read(piece.tensor, piece.rows, piece.columns, dtype)
            if isinstance(weight, PackedWeight):
                weight.put(first, rows)
            else:
                weight[first : first + len(rows)] = rows
            first += len(rows)

    loaded = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for param, weight in zip(params, pool.map(load, params), strict=True):
            loaded[param.name] = weight
            if on_bytes is not None:
                on_bytes(param.num_elements * dtype.itemsize)
    return loaded
