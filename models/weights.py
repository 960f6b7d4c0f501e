"""The reading of the slices of a checkpoint that a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch

from phalanx.errors import ModelError
from phalanx.kernels import (
    Experts,
    PackedExperts,
    PackedWeight,
    QuantisedWeight,
    Weight,
    make_packed,
    make_quantised,
    make_quantised_on,
)
from phalanx.kernels.triton_gpu import applies_on, find_triton
from phalanx.models.checkpoint import Checkpoint
from phalanx.models.params import Param, TensorSlice
from phalanx.models.quantised_slice import held_inputs, quantised_slice, read_values, weight_format
from phalanx.models.quantization import held_bytes, scheme_of
from phalanx.models.scheme import Scheme


def load_params(
    params: list[Param],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packed: bool = False,
    quantization: str = "none",
    num_threads: int = 1,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Reads the parameters as `dtype` onto `device`, several at a time. `on_bytes` hears each one's size when it is
    there.

    packed: matrices of products as `PackedWeight`s, where `kernels.choose_packing` finds them usable. quantization: as
    `model.quantization`; those that it quantises are `QuantisedWeight`s, the same part of the same whole however the
    matrix is cut. All others are tensors. Those of experts are `kernels.Experts`.
    """

    schemes = {param.name: scheme_of(quantization, param, checkpoint.entries) for param in params}
    places: dict[str, PackedExperts] = {}

    def place(held: Sequence[Param], make: Callable[[list[Sequence[int]]], Sequence[Weight]]) -> None:
        """In one piece of memory."""
        rooms = iter(make([param.shape[-2:] for param in held for _ in param.matrices]) if held else [])
        places.update((param.name, PackedExperts(islice(rooms, len(param.matrices)))) for param in held)

    if packed:
        place([param for param in params if param.multiplied and schemes[param.name] is None], make_packed)
    quantised = [(param, scheme) for param in params if (scheme := schemes[param.name]) is not None]
    formats = [weight_format(scheme.of_cut(param)) for param, scheme in quantised for _ in param.matrices]
    matrices = [(param, scheme, pieces) for param, scheme in quantised for pieces in param.matrices]
    stored = quantization == "stored"
    inputs = {
        pieces: held_inputs(checkpoint, pieces, scheme, held, stored=stored)
        for (_, scheme, pieces), held in zip(matrices, formats, strict=True)
    }
    if applies_on(device):
        for param, scheme in quantised:
            orders = [inputs[pieces].order for pieces in param.matrices]
            held = weight_format(scheme.of_cut(param))
            places[param.name] = PackedExperts(make_quantised_on(device, param.shape[-2:], held, dtype, orders))
    elif quantised and device.type != "cpu":
        raise ModelError(f"model.quantization on {device} needs Triton; there is {find_triton().told}")
    else:
        orders = [each.order for each in inputs.values()]
        place([param for param, _ in quantised], lambda shapes: make_quantised(shapes, formats, dtype, orders))

    def load(param: Param) -> Weight | Experts:
        held = places.get(param.name)
        if held is not None:
            for weight, pieces in zip(held, param.matrices, strict=True):
                fill(weight, pieces, schemes[param.name])
            return held if param.num_experts else held[0]
        tensor = torch.empty(param.shape, dtype=dtype, device=device)
        for part, pieces in zip(tensor if param.num_experts else [tensor], param.matrices, strict=True):
            fill(part, pieces, None)
        return tensor

    def fill(weight: Weight, pieces: tuple[TensorSlice, ...], scheme: Scheme | None) -> None:
        first = 0
        for piece in pieces:
            if isinstance(weight, QuantisedWeight):
                assert scheme is not None
                for rows in quantised_slice(checkpoint, piece, scheme, inputs[pieces], weight.device, stored=stored):
                    weight.put(first, rows)
                    first += len(rows.q)
                continue
            read = read_values(checkpoint, piece.tensor, piece.rows, piece.columns, dtype)
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
                on_bytes(held_bytes(schemes[param.name], param, dtype.itemsize))
    return loaded
