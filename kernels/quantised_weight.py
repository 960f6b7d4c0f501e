"""`QuantisedWeight`: a matrix of integers of 8 or 4 bits, or FP8 numbers, and their scales, as products read it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F

from phalanx.kernels.activations import Activations, QuantisedActivations
from phalanx.kernels.integer_inputs import MOST_INPUTS, integer_product
from phalanx.native import find_native

if TYPE_CHECKING:
    from phalanx.kernels.weight_on_gpu import WeightOnGpu

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of `ScaleType` in quantised.hpp
OCTET = 8  # inputs that lie together
BLOCK = 32  # outputs that native products have side by side


class WeightFormat(NamedTuple):
    """How a matrix [N, K] is held: W[n, k] = scales[n, g] * (q[n, k] - zeros[n, g]) + offsets[n, g], of k's group g.

    bits: 8, q from -128 to 127, or 4: q from 0 to 15 where there are offsets or zeros, else from -8 to 7. group_size:
    inputs that share a scale, a multiple of 8; None for all of an output. scale_dtype: of scales and offsets: float32,
    float16 or bfloat16. zeros: whether there are any: of 4 bits, or of 8 bits and 128 more than what is subtracted. An
    offset of -scale * zero would have to be rounded. e4m3: whether q are the bits of FP8 numbers (E4M3, without
    infinities: `torch.float8_e4m3fn`), of 8 bits and without offsets or zeros. activations: whether what is multiplied
    by it is quantised as well: on CPUs by integers, see `integer_product`; on GPUs with units that multiply so, to the
    dtype of q with a scale a token. input_group: inputs of a row that share a scale on CPUs, a multiple of 8 up to 64.
    """

    bits: int
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32
    offsets: bool = False
    zeros: bool = False
    e4m3: bool = False
    activations: bool = False
    input_group: int = MOST_INPUTS

    @property
    def q_dtype(self) -> torch.dtype:
        """Of what the bits of q stand for."""
        return torch.float8_e4m3fn if self.e4m3 else torch.int8

    @property
    def signed(self) -> bool:
        """Whether integers are below zero, too."""
        return not (self.bits == 4 and (self.offsets or self.zeros))

    @property
    def integer_inputs(self) -> bool:
        """Whether products on CPUs are of integers."""
        return self.activations and not self.e4m3

    def group_of(self, num_inputs: int) -> int:
        """Inputs of a group, of rows of so many."""
        return self.group_size or -(-num_inputs // OCTET) * OCTET

    def num_groups(self, num_inputs: int) -> int:
        return -(-num_inputs // self.group_of(num_inputs))

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Of the integers and their scales, without what rounds them up to blocks."""
        head = self.scale_dtype.itemsize * (1 + self.offsets) + self.zeros
        return num_outputs * (self.num_groups(num_inputs) * head + -(-num_inputs * self.bits // 8))


class QuantisedRows(NamedTuple):
    """Rows of a matrix: q [R, K] int8; scales, and offsets or None, [R, groups]; zeros or None [R, groups] uint8."""

    q: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    zeros: torch.Tensor | None = None


class QuantisedWeight:
    """A matrix [N, K] in few bits: `put` fills it, `linear` multiplies rows of `dtype` by it.

    A product is exact up to its sums in float32 and the last rounding: what is multiplied are the integers, scaled once
    a group (`kernels/csrc/quantised.hpp`). By the native library they are read as they are held; without it PyTorch
    multiplies by the matrix that they stand for, made anew for each product. On a GPU `WeightOnGpu` does all this.

    Inputs may be held in another order than x has them, so that those of a group lie together, and with room between.

    shape, dtype, device and numel are those of the matrix that it stands for; nbytes is what is held.
    """

    __slots__ = (
        *("_address", "_library", "_matrix", "_order", "_parts"),
        *("data", "device", "dtype", "format", "on_gpu", "shape"),
    )

    def __init__(
        self,
        num_outputs: int,
        num_inputs: int,
        held: WeightFormat,
        dtype: torch.dtype = torch.bfloat16,
        room: torch.Tensor | None = None,
        order: torch.Tensor | None = None,
        on_gpu: WeightOnGpu | None = None,
    ) -> None:
        """To be filled by `put`. dtype: of what is multiplied. room: uint8 zeros to lie in, as `make_quantised` cuts
        it, or its own. order: [held inputs] int64, which input of x each is, -1 for none; None for as they are.
        on_gpu: where it is on a GPU, made by `make_quantised_on`, which knows the order as well.
        """
        self.shape = torch.Size((num_outputs, num_inputs))
        self.dtype = dtype
        self.format = held
        self.device = torch.device("cpu") if on_gpu is None else on_gpu.data.device
        self.on_gpu = on_gpu
        self._order = order
        self._library = native_for(dtype) if on_gpu is None else None
        self._parts: QuantisedRows | None = None
        if on_gpu is not None:
            return
        num_held = self.num_held
        if self._library is None:
            groups = num_outputs, held.num_groups(num_held)
            self._parts = QuantisedRows(
                torch.zeros(num_outputs, num_held, dtype=torch.int8),
                torch.zeros(groups, dtype=held.scale_dtype),
                torch.zeros(groups, dtype=held.scale_dtype) if held.offsets else None,
                torch.zeros(groups, dtype=torch.uint8) if held.zeros else None,
            )
            return
        if room is None:
            room = torch.zeros(_room_bytes(self._library, (num_outputs, num_held), held), dtype=torch.uint8)
        self.data = room
        self._matrix = self._library.QuantisedMatrix(
            num_outputs,
            num_held,
            _native_format(held, num_held),
            self.data.data_ptr(),
            num_inputs,
            [] if order is None else order.tolist(),
        )
        self._address = self._matrix.address

    @property
    def num_held(self) -> int:
        """Inputs, with the room between them."""
        return self.shape[1] if self._order is None else len(self._order)

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
        """The matrix's rows from `first` on, inputs in the order in which they are held. One caller at a time for any
        32 rows.
        """
        num_rows, num_inputs = rows.q.shape
        groups, dtype = (num_rows, self.format.num_groups(num_inputs)), self.format.scale_dtype
        if num_inputs != self.num_held or first < 0 or first + num_rows > self.shape[0] or rows.q.dtype != torch.int8:
            raise ValueError(f"{list(rows.q.shape)} {rows.q.dtype} from row {first} on do not fit {list(self.shape)}")
        if (rows.offsets is not None) != self.format.offsets:
            raise ValueError(f"offsets are {'missing' if self.format.offsets else 'none'} in {self.format}")
        if (rows.zeros is not None) != self.format.zeros:
            raise ValueError(f"zeros are {'missing' if self.format.zeros else 'none'} in {self.format}")
        for each, wanted in ((rows.scales, dtype), (rows.offsets, dtype), (rows.zeros, torch.uint8)):
            if each is not None and (each.shape != groups or each.dtype != wanted):
                raise ValueError(f"scales {list(each.shape)} {each.dtype} are not {list(groups)} {wanted}")
        if self.on_gpu is not None:
            self.on_gpu.put(first, rows)
            return
        if self._parts is not None:
            with torch.inference_mode():  # these were perhaps made in it, by another thread
                for held, part in zip(self._parts, rows, strict=True):
                    if held is not None and part is not None:
                        held[first : first + num_rows] = part
            return
        parts = [None if part is None else part.contiguous() for part in rows]
        self._matrix.put(*(0 if part is None else part.data_ptr() for part in parts), first, num_rows)

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

    def multiply(
        self, x: Activations, bias: torch.Tensor | None, instructions: int = 0, outputs: slice | None = None
    ) -> torch.Tensor:
        """x [T, K], bias [N] or None -> [T, N], by the set `instructions` of the library's `linear_sets`. x: of
        `dtype`, or quantised to what the weight `takes`. outputs: as of `PackedWeight.multiply`, on the CPU.
        """
        first_block, num_outputs = block_range(self.shape[0], outputs)
        num_inputs = self.shape[1]
        if outputs is not None and self.on_gpu is not None:
            raise ValueError("on a GPU a quantised weight is multiplied by as a whole")
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
            return self._multiply_whole(x, bias, outputs or slice(None))
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
            first_block,
            num_outputs,
        )
        return y

    def part(self, x: Activations) -> torch.Tensor:
        """`multiply` without a bias, as a part of a sum over ranks that hold other inputs each: in float64 where such
        sums do not depend on who adds up what (`integer_product`), and the rounding would make them so.
        """
        if self._library is None and self.format.integer_inputs and self.dtype == torch.float32 and self.on_gpu is None:
            assert isinstance(x, torch.Tensor)
            return self._integer_product(x, slice(None))
        return self.multiply(x, None)

    def _multiply_whole(self, x: torch.Tensor, bias: torch.Tensor | None, outputs: slice) -> torch.Tensor:
        if not self.format.integer_inputs:
            return F.linear(x, self._standing_for(outputs), bias)
        y = self._integer_product(x, outputs)
        return (y if bias is None else y + bias).to(self.dtype)

    def _integer_product(self, x: torch.Tensor, outputs: slice) -> torch.Tensor:
        if self._order is not None:
            x = torch.where(self._order >= 0, x[:, self._order], torch.zeros((), dtype=x.dtype))
        rows, held = self._rows(outputs), self.format
        group = held.group_of(self.num_held)
        return integer_product(x, _integers(rows, held), rows.scales, rows.offsets, group, held.input_group)

    def _rows(self, rows: torch.Tensor | slice) -> QuantisedRows:
        assert self._parts is not None
        return QuantisedRows(*(None if part is None else part[rows] for part in self._parts))  # type: ignore[arg-type]

    def _standing_for(self, rows: torch.Tensor | slice) -> torch.Tensor:
        values = dequantise(self._rows(rows), self.format).to(self.dtype)
        if self._order is None:
            return values
        inputs = self._order >= 0
        return torch.zeros(len(values), self.shape[1], dtype=self.dtype).index_copy_(
            1, self._order[inputs], values[:, inputs]
        )


def block_range(num_outputs: int, outputs: slice | None) -> tuple[int, int]:
    """The first block of some of a matrix's outputs, and how many these are. Raises ValueError for other outputs."""
    if outputs is None:
        return 0, num_outputs
    if outputs.start % BLOCK or not 0 <= outputs.start < outputs.stop <= num_outputs:
        raise ValueError(
            f"outputs {outputs.start} to {outputs.stop} do not begin with a block of {BLOCK} of {num_outputs}"
        )
    return outputs.start // BLOCK, outputs.stop - outputs.start


def dequantise(rows: QuantisedRows, held: WeightFormat) -> torch.Tensor:
    """What they stand for, [R, K] float32."""
    values = rows.q.view(torch.float8_e4m3fn).float() if held.e4m3 else _integers(rows, held)
    values *= _spread(rows.scales, rows, held)
    return values if rows.offsets is None else values + _spread(rows.offsets, rows, held)


def _integers(rows: QuantisedRows, held: WeightFormat) -> torch.Tensor:
    """What is scaled, [R, K] float32."""
    values = rows.q.float()
    if rows.zeros is None:
        return values
    return values - (_spread(rows.zeros, rows, held) - (128 if held.bits == 8 else 0))


def _spread(scales: torch.Tensor, rows: QuantisedRows, held: WeightFormat) -> torch.Tensor:
    """Those of groups [R, groups] for each input, [R, K] float32."""
    num_inputs = rows.q.shape[1]
    return scales.float().repeat_interleave(held.group_of(num_inputs), 1)[:, :num_inputs]


def native_for(dtype: torch.dtype) -> ModuleType | None:
    """The native library where it multiplies rows of this dtype, else None."""
    library = find_native().library
    return library if library is not None and library.linear_sets and dtype == torch.bfloat16 else None


def told_of_quantised(dtype: torch.dtype, *, integer_inputs: bool = False) -> str:
    """Who makes products of rows of this dtype by quantised weights on a CPU, as half a sentence. integer_inputs: as of
    `WeightFormat`.
    """
    library, told = find_native()
    native = native_for(dtype)
    if native is not None:
        activations = "of layers in 8 bits, a scale for at most 64 inputs" if integer_inputs else "as they are"
        return f"native, {native.linear_sets[0]}: from quantised weights as they are held, activations {activations}"
    reason = told if library is None else "native products are in bfloat16 and need AVX2"
    return f"torch: quantised weights are made whole for each product ({reason})"


def _native_format(held: WeightFormat, num_inputs: int) -> tuple[int, int, int, bool, bool, int, int]:
    scales, group = SCALE_DTYPES.index(held.scale_dtype), held.group_of(num_inputs)
    inputs = held.input_group if held.integer_inputs else 0
    return held.bits, group, scales, held.offsets, held.zeros, int(held.e4m3), inputs


def _room_bytes(library: ModuleType, shape: Sequence[int], held: WeightFormat) -> int:
    return int(library.QuantisedMatrix.room_bytes(shape[0], shape[1], _native_format(held, shape[1])))


def make_quantised(
    shapes: Sequence[Sequence[int]],
    formats: Sequence[WeightFormat],
    dtype: torch.dtype,
    orders: Sequence[torch.Tensor | None] | None = None,
) -> list[QuantisedWeight]:
    """Quantised weights [N, K], to be filled, side by side in one piece of memory as `make_packed` lays them out.

    orders: of the inputs of each, as `QuantisedWeight` takes them.
    """
    library = native_for(dtype)
    orders = orders or [None] * len(shapes)
    rooms: Sequence[torch.Tensor | None] = [None] * len(shapes)
    if library is not None and shapes:
        held_shapes = [
            (shape[0], shape[1] if order is None else len(order)) for shape, order in zip(shapes, orders, strict=True)
        ]
        sizes = [_room_bytes(library, shape, held) for shape, held in zip(held_shapes, formats, strict=True)]
        room = torch.empty(sum(sizes), dtype=torch.uint8)
        library.advise_huge_pages(room.data_ptr(), room.nbytes)
        rooms = torch.split(room.zero_(), sizes)
    return [
        QuantisedWeight(shape[0], shape[1], held, dtype, room, order)
        for shape, held, room, order in zip(shapes, formats, rooms, orders, strict=True)
    ]
