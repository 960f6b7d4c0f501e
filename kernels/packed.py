"""`PackedWeight`: a matrix in the order in which the native product reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch

from phalanx.native import find_native

BLOCK_ROWS = 32  # of a weight that lie side by side; see `kernels/csrc/linear.hpp`


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
    return Packing(True, f"native, {library.linear_sets[0]}: from packed weights")


def packed_size(num_outputs: int, num_inputs: int) -> int:
    """Elements of a packed matrix [num_outputs, num_inputs]."""
    return -(-num_outputs // BLOCK_ROWS) * BLOCK_ROWS * -(-num_inputs // 2) * 2


def make_packed(shapes: Sequence[Sequence[int]]) -> list[PackedWeight]:
    """Packed weights [N, K], to be filled, side by side in one piece of memory with huge pages where the system gives
    them: products read a quarter faster from those (16 million weights: 45 GB/s for 35).
    """
    sizes = [packed_size(shape[0], shape[1]) for shape in shapes]
    room = torch.empty(sum(sizes), dtype=torch.bfloat16)
    library = find_native().library
    assert library is not None
    library.advise_huge_pages(room.data_ptr(), room.nbytes)
    parts = torch.split(room, sizes)
    return [PackedWeight(shape[0], shape[1], part) for shape, part in zip(shapes, parts, strict=True)]


class PackedWeight:
    """A bfloat16 matrix [N, K] on the CPU, held once, in packed order: `put` fills it, `linear` multiplies by it.

    shape, dtype, device, itemsize and numel are the matrix's, as of a tensor; nbytes is what is held. data: the packed
    tensor, rows and columns filled up with zeros. Needs `choose_packing(...).usable`.
    """

    __slots__ = ("_address", "_library", "data", "shape")

    dtype = torch.bfloat16
    device = torch.device("cpu")
    itemsize = torch.bfloat16.itemsize

    def __init__(self, num_outputs: int, num_inputs: int, room: torch.Tensor | None = None) -> None:
        """To be filled by `put`. room: bfloat16 [packed_size(num_outputs, num_inputs)] to lie in, or its own."""
        size = packed_size(num_outputs, num_inputs)
        self.data = torch.empty(size, dtype=self.dtype) if room is None else room
        if size > num_outputs * num_inputs:
            self.data.zero_()  # what fills it up stays zero
        self.shape = torch.Size((num_outputs, num_inputs))
        self._address = self.data.data_ptr()
        library = find_native().library
        assert library is not None
        self._library: ModuleType = library

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
        self._library.pack_weight(self._address, rows.data_ptr(), first, num_rows, num_inputs)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def numel(self) -> int:
        return math.prod(self.shape)

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [T] int64 -> [T, K], as of an embedding. Raises IndexError for a row that the matrix has not."""
        num_outputs, num_inputs = self.shape
        out = torch.empty(len(rows), num_inputs, dtype=self.dtype)
        rows = rows.to(torch.int64).contiguous()
        self._library.unpack_rows(out.data_ptr(), self._address, rows.data_ptr(), len(rows), num_outputs, num_inputs)
        return out

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None, instructions: int = 0) -> torch.Tensor:
        """x [T, K], bias [N] or None -> [T, N], by the set `instructions` of the library's `linear_sets`."""
        num_outputs, num_inputs = self.shape
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
            num_outputs,
            num_inputs,
            instructions,
        )
        return y


Weight = torch.Tensor | PackedWeight
"""A matrix to multiply by."""
