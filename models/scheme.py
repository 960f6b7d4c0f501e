"""`Scheme`: how a quantised matrix is held, and what a rank's part of it takes. Without torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

from phalanx.errors import ModelError

if TYPE_CHECKING:
    from phalanx.models.params import Param

OCTET = 8  # inputs that a product reads together

ScaleType = Literal["float32", "float16", "bfloat16"]
_SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Scheme(NamedTuple):
    """A weight is an integer of `bits` bits, less a zero where there are any, times a scale, plus an offset likewise.

    group_size: inputs of an output that share a scale; None for all. scale_type: of scales and offsets; a zero is a
    byte. e4m3: whether it is an FP8 number in place of the integer. act_order: whether the inputs of a group are
    scattered over all of them; a rank holds those of each group side by side.
    """

    bits: int
    group_size: int | None
    scale_type: ScaleType
    offsets: bool = False
    zeros: bool = False
    e4m3: bool = False
    act_order: bool = False

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
        same scales. Raises ModelError where a cut leaves no whole octets of inputs.
        """
        if self.group_size is None or not param.quantisable:
            return self
        if self.act_order:
            part = self._part_of_group(param)
            return self if part == self.group_size else self._replace(group_size=_least_padded(part, self))
        starts = {0 if piece.columns is None else piece.columns.start for piece in param.slices}
        if starts == {0}:
            return self
        group = math.gcd(self.group_size, *starts)
        if group % OCTET:
            raise ModelError(
                f"{param.slices[0].tensor}: a rank's inputs begin at {max(starts)}, in the middle of {OCTET} that lie"
                f" together (groups of {self.group_size}); cut by other weights, or over fewer ranks"
            )
        return self._replace(group_size=group)

    def held_bytes(self, param: Param) -> int:
        """Of a rank's part as it is held. Of scattered groups a cut leaves parts of unlike sizes: by estimate."""
        held, (num_outputs, num_inputs) = self.of_cut(param), param.shape[-2:]
        if self.act_order and held.group_size != self.group_size:
            assert self.group_size is not None
            part = self._part_of_group(param)
            num_inputs = round(num_inputs / part * _padded(part, held.group_size or 0))
        return len(param.matrices) * held.num_bytes(num_outputs, num_inputs)

    def share_bytes(self, param: Param) -> int:
        """Of a rank's part, if a part of a group took a part of its scales."""
        num_outputs, num_inputs = param.shape[-2:]
        groups = 1.0 if self.group_size is None else num_inputs / self.group_size
        return round(len(param.matrices) * num_outputs * (num_inputs * self.bits / 8 + groups * self.head_bytes))

    def _part_of_group(self, param: Param) -> float:
        """Inputs of a scattered group that a rank has, on average."""
        assert self.group_size is not None
        piece = param.slices[0]
        return self.group_size if piece.columns is None else self.group_size * piece.columns.size / piece.width


def _padded(part: float, group: int) -> float:
    """Inputs that are held for so many, in whole groups: about half a group more."""
    return max(group, part + (group - 1) / 2)


def _least_padded(part: float, scheme: Scheme) -> int:
    """The size of groups that holds so many inputs of each scattered group in the fewest bytes."""
    assert scheme.group_size is not None
    sizes = [OCTET << shift for shift in range(16) if OCTET << shift <= max(OCTET, scheme.group_size)]
    return min(sizes, key=lambda size: _padded(part, size) * (scheme.bits / 8 + scheme.head_bytes / size))
