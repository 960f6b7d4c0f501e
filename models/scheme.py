"""`Scheme`: how a quantised matrix is held, and what a rank's part of it takes. Without torch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from phalanx.models.params import Param

OCTET = 8  # inputs that a product reads together

ScaleType = Literal["float32", "float16", "bfloat16"]
_SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Scheme(NamedTuple):
    """A weight is an integer of `bits` bits, less a zero where there are any, times a scale, plus an offset likewise.

    group_size: inputs of an output that share a scale; None for all. scale_type: of scales and offsets; a zero is a
    byte. e4m3: whether it is an FP8 number in place of the integer. act_order: whether the inputs of a group are
    scattered over all of them; a rank holds those of each group side by side. activations: whether these are quantised,
    too, see `kernels.WeightFormat`.
    """

    bits: int
    group_size: int | None
    scale_type: ScaleType
    offsets: bool = False
    zeros: bool = False
    e4m3: bool = False
    act_order: bool = False
    activations: bool = False

    def num_groups(self, num_inputs: int) -> int:
        return 1 if self.group_size is None else -(-num_inputs // self.group_size)

    @property
    def head_bytes(self) -> int:
        """Of an output's group, beside its integers."""
        return _SCALE_BYTES[self.scale_type] * (1 + self.offsets) + self.zeros

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Of a matrix: its integers and their scales."""
        return num_outputs * (-(-num_inputs * self.bits // 8) + self.num_groups(num_inputs) * self.head_bytes)

    def of_cut(self, param: Param) -> Scheme:
        """How a rank holds its part of a matrix: where a cut falls into a group of inputs, in smaller groups with the
        same scales, or with room beside the inputs of a group that others have the rest of.
        """
        return self._replace(group_size=self._cut(param)[0])

    def held_bytes(self, param: Param) -> int:
        """Of a rank's part. Of scattered groups a cut leaves parts of unlike sizes: by estimate."""
        group_size, num_inputs = self._cut(param)
        return len(param.matrices) * self._replace(group_size=group_size).num_bytes(param.shape[-2], round(num_inputs))

    def share_bytes(self, param: Param) -> int:
        """Of a rank's part, if a part of a group took a part of its scales."""
        num_outputs, num_inputs = param.shape[-2:]
        groups = 1.0 if self.group_size is None else num_inputs / self.group_size
        return round(len(param.matrices) * num_outputs * (num_inputs * self.bits / 8 + groups * self.head_bytes))

    def _cut(self, param: Param) -> tuple[int | None, float]:
        """The size of a rank's groups, and how many inputs it holds, with the room between them."""
        num_inputs, piece = param.shape[-1], param.slices[0]
        if self.group_size is None or piece.columns is None or not param.quantisable:
            return self.group_size, num_inputs
        if self.act_order:
            return self._cut_scattered(self.group_size, piece.columns.size, piece.width)
        start, stop = piece.columns
        sizes = [size for size in range(OCTET, self.group_size + 1, OCTET) if self.group_size % size == 0]
        held = {size: _inputs_held(start, stop, self.group_size, size) for size in sizes}
        # Without room between, the inputs need not be gathered: that is worth a tenth of the bytes.
        best = min(
            reversed(sizes), key=lambda size: self._bytes_of(size, held[size]) * (1.1 if held[size] > num_inputs else 1)
        )
        return best, held[best]

    def _cut_scattered(self, group_size: int, num_inputs: int, width: int) -> tuple[int, float]:
        """Of each group, wherever its inputs are, a rank has a part: on average, as if half a group more."""
        if num_inputs == width:
            return group_size, num_inputs
        part = group_size * num_inputs / width
        sizes = [size for size in range(OCTET, group_size + 1, OCTET) if group_size % size == 0]
        held = {size: max(size, part + (size - 1) / 2) * width / group_size for size in sizes}
        best = min(sizes, key=lambda size: self._bytes_of(size, held[size]))
        return best, held[best]

    def _bytes_of(self, group_size: int, num_inputs: float) -> float:
        """Of an output."""
        return num_inputs * (self.bits / 8 + self.head_bytes / group_size)


def _inputs_held(start: int, stop: int, group_size: int, size: int) -> int:
    """Of inputs from `start` to `stop`, the parts of each group filled up to whole groups of `size`."""
    if start % size == 0:
        return stop - start
    borders = [start, *range(start // group_size * group_size + group_size, stop, group_size), stop]
    return sum(-(-(end - begin) // size) * size for begin, end in pairwise(borders))
