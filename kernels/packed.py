"""`PackedWeight`: a matrix as the native product reads it, in 12 bits a weight where that loses no bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from phalanx.kernels.quantised_weight import QuantisedWeight, block_range
from phalanx.native import find_native


class Packing(NamedTuple):
    """Whether weights of products are packed, and who makes the products, as half a sentence."""

    usable: bool
    told: str


def choose_packing(dtype: torch.dtype, device: torch.device) -> Packing:
    """Cheap after the first call."""
    library, told = find_native()
    if device.type != "cpu":
        return Packing(False, f"torch: weights are packed for a CPU, this is {device}")
    if library is None:
        return Packing(False, f"torch: {told}")
    if dtype != torch.bfloat16:
        return Packing(False, f"torch: native products are in bfloat16, this is {str(dtype).removeprefix('torch.')}")
    if not library.linear_sets:
        return Packing(False, "torch: native products need a processor with AVX2")
    return Packing(True, f"native, {library.linear_sets[0]}: from weights packed into 12 bits, lossless")


def make_packed(shapes: Sequence[Sequence[int]]) -> list[PackedWeight]:
    """Packed weights [N, K], to be filled, side by side in one piece of memory with huge pages where the system gives
    them: products read a quarter faster from those (16 million weights: 45 GB/s for 35).
    """
    library = find_native().library
    assert library is not None
    sizes = [library.PackedMatrix.room_bytes(shape[0], shape[1]) for shape in shapes]
    room = torch.empty(sum(sizes), dtype=torch.uint8)
    library.advise_huge_pages(room.data_ptr(), room.nbytes)
    parts = torch.split(room, sizes)
    return [PackedWeight(shape[0], shape[1], part) for shape, part in zip(shapes, parts, strict=True)]


class PackedWeight:
    """A bfloat16 matrix [N, K] on the CPU, held once, in packed order: `put` fills it, `linear` multiplies by it.

    A weight takes 12 bits, and every bit comes back (`kernels/csrc/packed.hpp`). Of 32 outputs whose exponents are too
    many for that, and of those that have come only in part, it takes 16.

    shape, dtype, device, itemsize and numel are the matrix's, as of a tensor; nbytes is what is held. data: bytes of
    weights in 12 bits. Needs `choose_packing(...).usable`.
    """

    __slots__ = ("_address", "_library", "_matrix", "data", "shape")

    dtype = torch.bfloat16
    device = torch.device("cpu")
    itemsize = torch.bfloat16.itemsize

    def __init__(self, num_outputs: int, num_inputs: int, room: torch.Tensor | None = None) -> None:
        """To be filled by `put`. room: the uint8 to lie in, as `make_packed` cuts it, or its own."""
        library = find_native().library
        assert library is not None
        self._library: ModuleType = library
        size = library.PackedMatrix.room_bytes(num_outputs, num_inputs)
        self.data = torch.empty(size, dtype=torch.uint8) if room is None else room
        self.shape = torch.Size((num_outputs, num_inputs))
        self._matrix = library.PackedMatrix(num_outputs, num_inputs, self.data.data_ptr())
        self._address: int = self._matrix.address

    @classmethod
    def pack(cls, weight: torch.Tensor) -> PackedWeight:
        """weight [N, K], bfloat16 on the CPU."""
        packed = cls(*weight.shape)
        packed.put(0, weight)
        return packed

    def put(self, first: int, rows: torch.Tensor) -> None:
        """rows [., K], bfloat16 on the CPU: the matrix's from row `first` on. One caller at a time for any 32 rows."""
        num_rows, num_inputs = rows.shape
        if num_inputs != self.shape[1] or first < 0 or first + num_rows > self.shape[0] or rows.dtype != self.dtype:
            raise ValueError(f"{list(rows.shape)} {rows.dtype} from row {first} on do not fit {list(self.shape)}")
        rows = rows.contiguous()
        self._matrix.put(rows.data_ptr(), first, num_rows)

    @property
    def nbytes(self) -> int:
        return int(self._matrix.num_bytes)

    @property
    def share_in_16_bits(self) -> float:
        """Of the blocks of 32 outputs, those that do not fit into 12 bits a weight."""
        return float(self._matrix.num_plain / max(1, self._matrix.num_blocks))

    def data_ptr(self) -> int:
        """What the native product calls it by."""
        return self._address

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [T] int64 -> [T, K], as of an embedding. Raises IndexError for a row that the matrix has not."""
        out = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        rows = rows.to(torch.int64).contiguous()
        self._matrix.take_rows(out.data_ptr(), rows.data_ptr(), len(rows))
        return out

    def held_rows(self, rows: torch.Tensor, first: int) -> torch.Tensor:
        """The same of a matrix that begins with row `first` of a larger one; zeros for rows that it has not."""
        out = torch.empty(len(rows), self.shape[1], dtype=self.dtype)
        rows = rows.to(torch.int64).contiguous()
        self._matrix.take_held_rows(out.data_ptr(), rows.data_ptr(), len(rows), first)
        return out

    def multiply(
        self, x: torch.Tensor, bias: torch.Tensor | None, instructions: int = 0, outputs: slice | None = None
    ) -> torch.Tensor:
        """x [T, K], bias [N] or None -> [T, N], by the set `instructions` of the library's `linear_sets`.

        outputs: the N rows of the matrix to multiply by, from a multiple of `BLOCK` on; None for all.
        """
        first_block, num_outputs = block_range(self.shape[0], outputs)
        num_inputs = self.shape[1]
        if x.dim() != 2 or x.shape[1] != num_inputs or x.dtype != self.dtype:
            raise ValueError(f"x is {list(x.shape)} {x.dtype}, for a weight {[num_outputs, num_inputs]} in bfloat16")
        if bias is not None and (bias.shape != (num_outputs,) or bias.dtype != self.dtype):
            raise ValueError(f"the bias is {list(bias.shape)} {bias.dtype}, of {num_outputs} outputs in bfloat16")
        if x.stride(1) != 1:
            x = x.contiguous()
        y = torch.empty(x.shape[0], num_outputs, dtype=self.dtype)
        self._library.linear(
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


Weight = torch.Tensor | PackedWeight | QuantisedWeight
"""A matrix to multiply by."""


def taken_by(weight: Weight) -> torch.dtype | None:
    """What activations are quantised to, to 8 bits, before they are multiplied by it; None where they are not."""
    return weight.takes if isinstance(weight, QuantisedWeight) else None


def is_native(weight: Weight) -> bool:
    """Whether products by it, and the taking of its rows, are native calls."""
    return isinstance(weight, PackedWeight) or (isinstance(weight, QuantisedWeight) and weight.native)
