"""The reading of the slices of a checkpoint that a rank holds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from phalanx.kernels import PackedWeight, Weight, make_packed
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.params import Param


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
    tensors.
    """

    multiplied = [param for param in params if packed and param.multiplied]
    matrices = make_packed([param.shape for param in multiplied]) if multiplied else []
    places = {param.name: matrix for param, matrix in zip(multiplied, matrices, strict=True)}

    def load(param: Param) -> Weight:
        weight: Weight = places.get(param.name) or torch.empty(param.shape, dtype=dtype, device=device)
        first = 0
        for piece in param.slices:
            rows = checkpoint.read(piece.tensor, piece.rows, piece.columns, dtype)
            if isinstance(weight, PackedWeight):
                weight.put(first, rows)
            else:
                weight[first : first + len(rows)] = rows
            first += len(rows)
        return weight

    loaded = {}
    with ThreadPoolExecutor(num_threads) as pool:
        for param, weight in zip(params, pool.map(load, params), strict=True):
            loaded[param.name] = weight
            if on_bytes is not None:
                on_bytes(param.num_elements * dtype.itemsize)
    return loaded
