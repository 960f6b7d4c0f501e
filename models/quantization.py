"""How matrices of products are held that are quantised: by the checkpoint, or while it is loaded. Without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import NamedTuple

from phalanx.errors import ModelError
from phalanx.models.params import Param
from phalanx.models.tensor_entry import TensorEntry

OCTET = 8  # inputs that a product reads together


class Scheme(NamedTuple):
    """A weight is an integer of `bits` bits times a scale, plus an offset where there are any.

    group_size: inputs of an output that share a scale; None for all. scale_bytes: 4 for float32, 2 for float16.
    floating: it is a number in E4M3 instead. activations: whether these are quantised, too, with a scale a token, where
    the device has units that multiply so.
    """

    bits: int
    group_size: int | None
    scale_bytes: int
    offsets: bool = False
    floating: bool = False
    activations: bool = False

    def num_bytes(self, num_outputs: int, num_inputs: int) -> int:
        """Of a matrix: its integers and their scales."""
        groups = 1 if self.group_size is None else -(-num_inputs // self.group_size)
        return num_outputs * (-(-num_inputs * self.bits // 8) + groups * self.scale_bytes * (1 + self.offsets))

    def of_cut(self, param: Param) -> Scheme:
        """How a rank holds its part of a matrix: where a cut falls into a group of inputs, in smaller groups with the
        same scales. Raises ModelError where a cut leaves no whole octets of inputs.
        """
        starts = {0 if piece.columns is None else piece.columns.start for piece in param.slices}
        if self.group_size is None or starts == {0} or not param.quantisable:
            return self
        group = math.gcd(self.group_size, *starts)
        if group % OCTET:
            raise ModelError(
                f"{param.slices[0].tensor}: a rank's inputs begin at {max(starts)}, in the middle of {OCTET} that lie"
                f" together (groups of {self.group_size}); cut by other weights, or over fewer ranks"
            )
        return self._replace(group_size=group)


INT8 = Scheme(bits=8, group_size=None, scale_bytes=4)
INT4 = Scheme(bits=4, group_size=32, scale_bytes=2, offsets=True)

W8A8 = INT8._replace(activations=True)
FP8 = W8A8._replace(floating=True)

SCHEMES: Mapping[str, tuple[Scheme, Scheme]] = {
    "int8": (INT8, INT8),
    "int4": (INT4, INT8),
    "w8a8": (W8A8, INT8),
    "fp8": (FP8, INT8),
}
"""Of the layers' matrices, and of head and tied embedding: a logit errs by all of a row's errors, and a vocabulary is a
third of a small model. By the names of `model.quantization`, which may be `none` or `stored` beside them.
"""

STORED: Mapping[str, Scheme] = {
    "Q8_0": Scheme(bits=8, group_size=32, scale_bytes=2),
    "Q4_0": Scheme(bits=4, group_size=32, scale_bytes=2),
    "Q4_1": Scheme(bits=4, group_size=32, scale_bytes=2, offsets=True),
}
"""By the encodings of checkpoints whose blocks a product can read as they are."""


def held_bytes(scheme: Scheme | None, param: Param, itemsize: int) -> int:
    """Of a parameter on a rank. scheme: None for one that is held as it is, in numbers of `itemsize` bytes."""
    if scheme is None:
        return param.num_elements * itemsize
    with suppress(ModelError):  # whoever loads it says so
        scheme = scheme.of_cut(param)
    num_outputs, num_inputs = param.shape[-2:]
    return len(param.matrices) * scheme.num_bytes(num_outputs, num_inputs)


def scheme_of(quantization: str, param: Param, entries: Mapping[str, TensorEntry]) -> Scheme | None:
    """How a matrix is held, of which `param` may be a part; None for one that is not quantised.

    quantization: as `model.quantization`. entries: of the checkpoint; what is missing there counts as not quantised.
    """
    if not param.quantisable:
        return None
    if quantization in SCHEMES:
        layers, head = SCHEMES[quantization]
        return head if param.name in ("embed", "head") else layers
    if quantization == "none":
        return None
    encodings = {entries[piece.tensor].encoding if piece.tensor in entries else "" for piece in param.slices}
    return STORED.get(encodings.pop()) if len(encodings) == 1 else None
