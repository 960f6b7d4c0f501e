"""`WeightOnGpu`: what a `QuantisedWeight` is on a GPU, where the Triton operators multiply by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.activations import Activations, QuantisedActivations
from phalanx.kernels.quantised_rows import quantise_rows
from phalanx.kernels.quantised_weight import QuantisedRows, QuantisedWeight, WeightFormat, dequantise

_ALIGNED = 16  # bytes that rows of 8-bit weights are a multiple of, for Hopper's tensor memory accelerator


class Numbers(NamedTuple):
    """Of `num` matrices [N, K]. data: [num, ...] as the operators read each; scales, and offsets or None, [num, groups,
    N]. group_size: inputs of a group.
    """

    data: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    group_size: int

    @classmethod
    def make(cls, num: int, num_outputs: int, num_inputs: int, held: WeightFormat, device: torch.device) -> Numbers:
        """Zeros."""
        if held.bits == 4:
            shape = _operators().int4_shape(num_outputs, num_inputs)
            data = torch.zeros(num, *shape, dtype=torch.int16, device=device)
        else:
            width = -(-num_inputs // _ALIGNED) * _ALIGNED
            data = torch.zeros(num, num_outputs, width, dtype=held.q_dtype, device=device)
        scales = torch.zeros(num, held.num_groups(num_inputs), num_outputs, dtype=held.scale_dtype, device=device)
        offsets = torch.zeros_like(scales) if held.offsets else None
        if held.zeros:
            offsets = torch.zeros_like(scales, dtype=torch.float32)
        return cls(data, scales, offsets, held.group_of(num_inputs))


class WeightOnGpu:
    """A matrix [N, K], one of those whose numbers lie side by side. takes: what activations are quantised to before
    they are multiplied by it: where the format asks for that, an output has one scale, and the GPU has matrix units for
    it; else None. Zeros are held as offsets in float32.

    num_inputs, order: as they are held, see `QuantisedWeight`; those of x are `x_inputs`.
    """

    __slots__ = ("_held", "_num_inputs", "_order", "_x_inputs", "data", "numbers", "offsets", "scales", "takes")

    def __init__(
        self,
        numbers: Numbers,
        index: int,
        num_inputs: int,
        held: WeightFormat,
        x_inputs: int,
        order: torch.Tensor | None = None,
    ) -> None:
        self._held = held
        self._num_inputs = num_inputs
        self._x_inputs = x_inputs
        self._order = None if order is None else order.to(numbers.data.device)
        self.numbers = numbers
        self.data, self.scales = numbers.data[index], numbers.scales[index]
        self.offsets = None if numbers.offsets is None else numbers.offsets[index]
        self.takes: torch.dtype | None = None
        if held.activations and len(self.scales) == 1 and self.offsets is None and held.bits == 8 and order is None:
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
                self.data[:, first:last] = _operators().pack_int4(q, signed=self._held.signed)
            else:
                self.data[first:last, : self._num_inputs] = q.view(self._held.q_dtype)
            scales = rows.scales.to(device).T
            self.scales[:, first:last] = scales
            if self.offsets is None:
                return
            if rows.offsets is not None:
                self.offsets[:, first:last] = rows.offsets.to(device).T
            if rows.zeros is not None:
                zeros = rows.zeros.to(device).T.float() - (128 if self._held.bits == 8 else 0)
                self.offsets[:, first:last] -= zeros * scales.float()

    def held_rows(self, rows: torch.Tensor, first: int, dtype: torch.dtype) -> torch.Tensor:
        """As of `QuantisedWeight`; nothing waits for the GPU."""
        local = rows.to(torch.int64) - first
        missing = (local < 0) | (local >= self.scales.shape[1])
        local = local.masked_fill(missing, 0)
        if self._held.bits == 4:
            q = _operators().unpack_int4(self.data[:, local], self._num_inputs, signed=self._held.signed)
        else:
            q = self.data.view(torch.int8)[local][:, : self._num_inputs]
        offsets = None if self.offsets is None else self.offsets[:, local].T
        found = dequantise(QuantisedRows(q, self.scales[:, local].T, offsets), self._held).to(dtype)
        found.masked_fill_(missing.unsqueeze(1), 0)
        if self._order is None:
            return found
        # One column more, for what is held and no input.
        places = torch.where(self._order >= 0, self._order, self._x_inputs)
        return found.new_zeros(len(found), self._x_inputs + 1).index_copy_(1, places, found)[:, : self._x_inputs]

    def multiply(self, x: Activations, bias: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """-> [T, N] of `dtype`, which x has where it is not quantised."""
        gpu, held = _operators(), self._held
        if self._order is not None and isinstance(x, torch.Tensor):
            x = x.index_select(1, self._order.clamp(min=0)).masked_fill_(self._order < 0, 0)
        if self.takes is not None and isinstance(x, torch.Tensor):
            x = QuantisedActivations(*quantise_rows(x, self.takes))
        if isinstance(x, QuantisedActivations):
            by = gpu.linear_fp8_w8a8 if held.e4m3 else gpu.linear_w8a8
            return by(x.q, x.scales, self.data, self.scales[0], bias, dtype)  # type: ignore[no-any-return]
        group = held.group_of(self._num_inputs)
        if held.e4m3:
            return gpu.linear_fp8_w8a16(x, self.data, self.scales, bias, group)  # type: ignore[no-any-return]
        by = gpu.linear_w4a16 if held.bits == 4 else gpu.linear_w8a16
        return by(x, self.data, self.scales, self.offsets, bias, group)  # type: ignore[no-any-return]


def make_quantised_on(
    device: torch.device,
    shape: Sequence[int],
    held: WeightFormat,
    dtype: torch.dtype,
    orders: Sequence[torch.Tensor | None],
) -> list[QuantisedWeight]:
    """Quantised weights [N, K], to be filled, where the Triton operators apply to `device`: of one shape, side by side
    in one piece of memory where inputs are held as x has them. orders: of the inputs of each, as `QuantisedWeight`
    takes them.
    """
    num_outputs, num_inputs = shape
    # Inputs in orders of their own are of unlike numbers, too.
    sets = [orders] if all(order is None for order in orders) else [[order] for order in orders]
    weights = []
    with torch.inference_mode(False):  # they are filled by other threads
        for together in sets:
            num_held = num_inputs if together[0] is None else len(together[0])
            numbers = Numbers.make(len(together), num_outputs, num_held, held, device)
            for index, order in enumerate(together):
                on_gpu = WeightOnGpu(numbers, index, num_held, held, num_inputs, order)
                weights.append(QuantisedWeight(num_outputs, num_inputs, held, dtype, order=order, on_gpu=on_gpu))
    return weights


def numbers_of(weights: Sequence[object]) -> Numbers | None:
    """Of matrices that `make_quantised_on` made together; None for others."""
    first = weights[0]
    on_gpu = first.on_gpu if isinstance(first, QuantisedWeight) else None
    return None if on_gpu is None or len(on_gpu.numbers.data) != len(weights) else on_gpu.numbers


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
