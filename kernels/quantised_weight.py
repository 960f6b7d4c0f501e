"""`QuantisedWeight`: a matrix of integers of 8 or 4 bits and their scales, as products read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from phalanx.kernels.activations import Activations, QuantisedActivations
from phalanx.native import find_native

if TYPE_CHECKING:
    from phalanx.kernels.weight_on_gpu import WeightOnGpu

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of `ScaleType` in quantised.hpp
OCTET = 8  # inputs that lie together


class WeightFormat(NamedTuple):
    """How a matrix [N, K] is held. W[n, k] = scales[n, k // group_size] * q[n, k] + offsets[n, k // group_size].

    bits: 8, q from -128 to 127, or 4: q from 0 to 15 where there are offsets, else from -8 to 7. group_size: inputs
    that share a scale, a multiple of 8; None for all of an output. scale_dtype: of scales and offsets: float32, float16
    or bfloat16. floating: q is in E4M3, of 8 bits. activations: whether those that it is multiplied by are quantised,
    too, to the dtype of q, on GPUs with units that multiply so.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    offsets: bool = False
    floating: bool = False
    activations: bool = False

    @property
    def q_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn if self.floating else torch.int8

    def group_of(self, num_inputs: int) -> int:
        """Inputs of a group, of rows of so many."""
        return self.group_size or -(-num_inputs // OCTET) * OCTET

    def num_groups(self, num_inputs: int) -> int:
        return -(-num_inputs // self.group_of(num_inputs))

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Of the integers and their scales, without what rounds them up to blocks."""
        heads = self.num_groups(num_inputs) * self.scale_dtype.itemsize * (1 + self.offsets)
        return num_outputs * (heads + -(-num_inputs * self.bits // 8))


class QuantisedRows(NamedTuple):
    """Rows of a matrix: q [R, K] of `WeightFormat.q_dtype`; scales, and offsets or None, [R, groups]."""

    q: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None


class QuantisedWeight:
    """A matrix [N, K] in few bits: `put` fills it, `linear` multiplies rows of `dtype` by it.

    A product is exact up to its sums in float32 and the last rounding: what is multiplied are the integers, scaled once
    a group (`kernels/csrc/quantised.hpp`). By the native library they are read as they are held; without it PyTorch
    multiplies by the matrix that they stand for, made anew for each product. On a GPU `WeightOnGpu` does all this.

    shape, dtype, device and numel are those of the matrix that it stands for; nbytes is what is held.
    """

    __slots__ = ("_address", "_library", "_matrix", "_parts", "data", "device", "dtype", "format", "on_gpu", "shape")

    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        held: WeightFormat,
        dtype: torch.dtype = torch.bfloat16,
        room: torch.Tensor | None = None,
        on_gpu: WeightOnGpu | None = None,
    ) -> None:
        """To be filled by `put`. dtype: of what is multiplied. room: uint8 zeros to lie in, as `make_quantised` cuts
        it, or its own. on_gpu: where it is on a GPU, made by `make_quantised_on`.
        """
        self.shape = torch.Size((num_outputs, num_inputs))
        self.dtype = dtype
        self.format = held
        self.device = torch.device("cpu") if on_gpu is None else on_gpu.data.device
        self.on_gpu = on_gpu
        self._library = native_for(dtype, held) if on_gpu is None else None
        self._parts: QuantisedRows | None = None
        if on_gpu is not None:
            return
        if self._library is None:
            groups = num_outputs, held.num_groups(num_inputs)
            self._parts = QuantisedRows(
                torch.zeros(num_outputs, num_inputs, dtype=held.q_dtype),
                torch.zeros(groups, dtype=held.scale_dtype),
                torch.zeros(groups, dtype=held.scale_dtype) if held.offsets else None,
            )
            return
        if room is None:
            room = torch.zeros(_room_bytes(self._library, self.shape, held), dtype=torch.uint8)
        self.data = room
        self._matrix = self._library.QuantisedMatrix(
            num_outputs, num_inputs, *_native_format(held, num_inputs), self.data.data_ptr()
        )
        self._address = self._matrix.address

    @property
    def native(self) -> bool:
        return self._library is not None

    @property
    def takes(self) -> torch.dtype | None:
        """The dtype, of 8 bits, that activations are quantised to before they are multiplied by it; None for none."""
        return None if self.on_gpu is None else self.on_gpu.takes

    @property
    def itemsize(self) -> int:
        """Of a weight in memory, in whole bytes."""
        return 1

    @property
    def nbytes(self) -> int:
        if self.on_gpu is not None:
            return self.on_gpu.nbytes
        if self._parts is None:
            return int(self.data.nbytes)
        return sum(part.nbytes for part in self._parts if part is not None)

    def data_ptr(self) -> int:
        """By which profiles know it."""
        if self.on_gpu is not None:
            return self.on_gpu.data.data_ptr()
        return self._address if self._library is not None else id(self)

    def numel(self) -> int:
        return math.prod(self.shape)

    def put(self, first: int, rows: QuantisedRows) -> None:
        """The matrix's rows from `first` on. One caller at a time for any 32 rows."""
        num_rows, num_inputs = rows.q.shape
        groups, dtype = (num_rows, self.format.num_groups(num_inputs)), self.format.scale_dtype
        if (
            num_inputs != self.shape[1]
            or first < 0
            or first + num_rows > self.shape[0]
            or rows.q.dtype != self.format.q_dtype
        ):
            raise ValueError(f"{list(rows.q.shape)} {rows.q.dtype} from row {first} on do not fit {list(self.shape)}")
        if (rows.offsets is not None) != self.format.offsets:
            raise ValueError(f"offsets are {'missing' if self.format.offsets else 'none'} in {self.format}")
        for each in (rows.scales, rows.offsets):
            if each is not None and (each.shape != groups or each.dtype != dtype):
                raise ValueError(f"scales {list(each.shape)} {each.dtype} are not {list(groups)} {dtype}")
        if self.on_gpu is not None:
            self.on_gpu.put(first, rows)
            return
        if self._parts is not None:
            with torch.inference_mode():  # these were perhaps made in it, by another thread
                for held, part in zip(self._parts, rows, strict=True):
                    if held is not None and part is not None:
                        held[first : first + num_rows] = part
            return
        q, scales = rows.q.contiguous(), rows.scales.contiguous()
        offsets = None if rows.offsets is None else rows.offsets.contiguous()
        self._matrix.put(q.data_ptr(), scales.data_ptr(), 0 if offsets is None else offsets.data_ptr(), first, num_rows)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [T] int64 -> [T, K], as of an embedding."""
        return self.held_rows(rows, 0)

    def held_rows(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """The same of a matrix that begins with row `first` of a larger one; zeros for rows that it has not."""
        if self.on_gpu is not None:
            return self.on_gpu.held_rows(rows, first, self.dtype)
        rows = rows.to(torch.int64).contiguous()
        if self._parts is None:
            out = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
            self._matrix.take_held_rows(out.data_ptr(), rows.data_ptr(), len(rows), first)
            return out
        here = (rows >= first) & (rows < first + self.shape[0])
        out = torch.zeros(len(rows), self.shape[1], dtype=self.dtype)
        out[here] = self._standing_for(rows[here] - first)
        return out

    def multiply(self, x: Activations, bias: torch.Tensor | None, instructions: int = 0) -> torch.Tensor:
        """x [T, K], bias [N] or None -> [T, N], by the set `instructions` of the library's `linear_sets`. x: of
        `dtype`, or quantised to what the weight `takes`.
        """
        num_outputs, num_inputs = self.shape
        if isinstance(x, QuantisedActivations):
            if self.on_gpu is None or x.q.dtype != self.takes or x.shape[1] != num_inputs:
                wanted = f"a weight {[num_outputs, num_inputs]} that takes {self.takes}"
                raise ValueError(f"x is {list(x.shape)} {x.q.dtype}, for {wanted}")
            return self.on_gpu.multiply(x, bias, self.dtype)
        if x.dim() != 2 or x.shape[1] != num_inputs or x.dtype != self.dtype:
            raise ValueError(
                f"x is {list(x.shape)} {x.dtype}, for a weight {[num_outputs, num_inputs]} in {self.dtype}"
            )
        if bias is not None and (bias.shape != (num_outputs,) or bias.dtype != self.dtype):
            raise ValueError(f"the bias is {list(bias.shape)} {bias.dtype}, of {num_outputs} outputs in {self.dtype}")
        if self.on_gpu is not None:
            return self.on_gpu.multiply(x, bias, self.dtype)
        if self._library is None:
            return F.linear(x, self._standing_for(slice(None)), bias)
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], num_outputs, dtype=self.dtype)
        self._library.quantised_linear(
            y.data_ptr(),
            x.data_ptr(),
            x.stride(0),
            self._address,
            0 if bias is None else bias.contiguous().data_ptr(),
            x.shape[0],
            instructions,
        )
        return y

    def _standing_for(self, rows: torch.Tensor | slice) -> torch.Tensor:
        assert self._parts is not None
        part = QuantisedRows(*(None if part is None else part[rows] for part in self._parts))  # type: ignore[arg-type]
        return dequantise(part, self.format).to(self.dtype)


def dequantise(rows: QuantisedRows, held: WeightFormat) -> torch.Tensor:
    """What they stand for, [R, K] float32."""
    num_inputs = rows.q.shape[1]
    group = held.group_of(num_inputs)

    def spread(scales: torch.Tensor) -> torch.Tensor:
        return scales.float().repeat_interleave(group, 1)[:, :num_inputs]

    values = rows.q.float() * spread(rows.scales)
    return values if rows.offsets is None else values + spread(rows.offsets)


def native_for(dtype: torch.dtype, held: WeightFormat | None = None) -> ModuleType | None:
    """The native library where it multiplies rows of this dtype by weights held so, or by integers; else None."""
    library = find_native().library
    fits = dtype == torch.bfloat16 and not (held is not None and held.floating)
    return library if library is not None and library.linear_sets and fits else None


def told_of_quantised(dtype: torch.dtype, *, floating: bool = False) -> str:
    """Who makes products of rows of this dtype by quantised weights on a CPU, as half a sentence. floating: as of
    `WeightFormat`.
    """
    library, told = find_native()
    native = native_for(dtype, WeightFormat(8, floating=floating))
    if native is not None:
        return f"native, {native.linear_sets[0]}: from weights in integers, activations as they are"
    reason = told if library is None else "native products are by integers, in bfloat16, and need AVX2"
    return f"torch: quantised weights are made whole for each product ({reason})"


def _native_format(held: WeightFormat, num_inputs: int) -> tuple[int, int, int, bool]:
    return held.bits, held.group_of(num_inputs), SCALE_DTYPES.index(held.scale_dtype), held.offsets


def _room_bytes(library: ModuleType, shape: Sequence[int], held: WeightFormat) -> int:
    return int(library.QuantisedMatrix.room_bytes(shape[0], shape[1], *_native_format(held, shape[1])))


def make_quantised(
    shapes: Sequence[Sequence[int]], formats: Sequence[WeightFormat], dtype: torch.dtype
) -> list[QuantisedWeight]:
    """Quantised weights [N, K], to be filled, side by side in one piece of memory as `make_packed` lays them out."""
    library = native_for(dtype)
    rooms: Sequence[torch.Tensor | None] = [None] * len(shapes)
    if library is not None and shapes:
        # What is not multiplied natively has tensors of its own.
        sizes = [
            _room_bytes(library, shape, held) if native_for(dtype, held) is not None else 0
            for shape, held in zip(shapes, formats, strict=True)
        ]
        room = torch.empty(sum(sizes), dtype=torch.uint8)
        library.advise_huge_pages(room.data_ptr(), room.nbytes)
        rooms = torch.split(room.zero_(), sizes)
    return [
        QuantisedWeight(shape[0], shape[1], held, dtype, room)
        for shape, held, room in zip(shapes, formats, rooms, strict=True)
    ]
