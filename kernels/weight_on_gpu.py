"""`WeightOnGpu`: what a `QuantisedWeight` is on a GPU, where the Triton operators multiply by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.activations import Activations, QuantisedActivations
from phalanx.kernels.quantised_rows import quantise_rows
from phalanx.kernels.quantised_weight import QuantisedRows, QuantisedWeight, WeightFormat, dequantise

_ALIGNED = 16  # bytes that rows of 8-bit weights are a multiple of, for Hopper's tensor memory accelerator


class WeightOnGpu:
    """A matrix [N, K]. data: its numbers, as the operators read them; scales, and offsets or None: [groups, N]. takes:
    what activations are quantised to before they are multiplied by it: where the format asks for that, an output has
    one scale, and the GPU has matrix units for it; else None.
    """

    __slots__ = ("_held", "_num_inputs", "data", "offsets", "scales", "takes")

    def __init__(self, num_outputs: int, num_inputs: int, held: WeightFormat, device: torch.device) -> None:
        self._held = held
        self._num_inputs = num_inputs
        if held.bits == 4:
            shape = _operators().packed_shape(num_outputs, num_inputs)
            self.data = torch.zeros(shape, dtype=torch.int16, device=device)
        else:
            width = -(-num_inputs // _ALIGNED) * _ALIGNED
            self.data = torch.zeros(num_outputs, width, dtype=held.q_dtype, device=device)
        groups = held.num_groups(num_inputs), num_outputs
        self.scales = torch.zeros(groups, dtype=held.scale_dtype, device=device)
        self.offsets = torch.zeros_like(self.scales) if held.offsets else None
        self.takes: torch.dtype | None = None
        if held.activations and groups[0] == 1 and not held.offsets and held.bits == 8:
            fits = triton_gpu.narrowing_operators_for(self.data, held.q_dtype) is not None
            self.takes = held.q_dtype if fits else None

    @property
    def nbytes(self) -> int:
        parts = self.data, self.scales, self.offsets
        return sum(part.nbytes for part in parts if part is not None)

    def put(self, first: int, rows: QuantisedRows) -> None:
        device, last = self.data.device, first + len(rows.q)
        q = rows.q.to(device)
        with torch.inference_mode():  # these were perhaps made in it, by another thread
            if self._held.bits == 4:
                self.data[:, first:last] = _operators().pack(q, signed=not self._held.offsets)
            else:
                self.data[first:last, : self._num_inputs] = q
            self.scales[:, first:last] = rows.scales.to(device).T
            if self.offsets is not None and rows.offsets is not None:
                self.offsets[:, first:last] = rows.offsets.to(device).T

    def held_rows(self, rows: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `QuantisedWeight`; nothing waits for the GPU."""
        local = rows.to(torch.int64) - first
        missing = (local < 0) | (local >= self.scales.shape[1])
        local = local.masked_fill(missing, 0)
        if self._held.bits == 4:
            q = _operators().unpack(self.data[:, local], self._num_inputs, signed=not self._held.offsets)
        else:
            q = self.data.view(torch.uint8)[local].view(self.data.dtype)[:, : self._num_inputs]
        offsets = None if self.offsets is None else self.offsets[:, local].T
        found = dequantise(QuantisedRows(q, self.scales[:, local].T, offsets), self._held).to(dtype)
        return found.masked_fill_(missing.unsqueeze(1), 0)

    def multiply(self, x: Activations, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """-> [T, N] of `dtype`, which x has where it is not quantised."""
        gpu, held = _operators(), self._held
        if self.takes is not None and isinstance(x, torch.Tensor):
            x = QuantisedActivations(*quantise_rows(x, self.takes))
        if isinstance(x, QuantisedActivations):
            by = gpu.linear_fp8_w8a8 if held.floating else gpu.linear_w8a8
            return by(x.q, x.scales, self.data, self.scales[0], bias, dtype)  # type: ignore[no-any-return]
        group = held.group_of(self._num_inputs)
        if held.floating:
            return gpu.linear_fp8_w8a16(x, self.data, self.scales, bias, group)  # type: ignore[no-any-return]
        by = gpu.linear_w4a16 if held.bits == 4 else gpu.linear_w8a16
        return by(x, self.data, self.scales, self.offsets, bias, group)  # type: ignore[no-any-return]


def make_quantised_on(
    device: torch.device, shapes: Sequence[Sequence[int]], formats: Sequence[WeightFormat], dtype: torch.dtype
) -> list[QuantisedWeight]:
    """As `make_quantised`, where the Triton operators apply to `device`."""
    return [
        QuantisedWeight(shape[0], shape[1], held, dtype, on_gpu=WeightOnGpu(shape[0], shape[1], held, device))
        for shape, held in zip(shapes, formats, strict=True)
    ]


def told_on_gpu(weights: Iterable[object]) -> str:
    """Who makes products by these, as half a sentence."""
    taken = {weight.takes for weight in weights if isinstance(weight, QuantisedWeight)} - {None}
    told = "Triton: from weights as they are held, activations "
    if not taken:
        return told + "as they are"
    return told + f"of layers in {', '.join(str(each).removeprefix('torch.') for each in taken)}, a scale a token"


def _operators() -> Any:
    """The module `phalanx.kernels.gpu`; told to the watch, where there is one."""
    return triton_gpu.find_triton().operators
