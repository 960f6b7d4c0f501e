"""How matrices of products are held that are quantised: by the checkpoint, or while it is loaded. Without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

from phalanx.models.config import DecoderConfig
from phalanx.models.families import stored_name
from phalanx.models.params import Param
from phalanx.models.scheme import OCTET, Scheme
from phalanx.models.tensor_entry import TensorEntry

INT8 = Scheme(bits=8, group_size=None, scale_type="float32")
INT4 = Scheme(bits=4, group_size=32, scale_type="float16", offsets=True)

W8A8, W4A8 = INT8._replace(activations=True), INT4._replace(activations=True)
FP8 = W8A8._replace(e4m3=True)

SCHEMES: Mapping[str, tuple[Scheme, Scheme]] = {
    "int8": (INT8, INT8),
    "int4": (INT4, INT8),
    "w8a8": (W8A8, INT8),
    "w4a8": (W4A8, INT8),
    "fp8": (FP8, INT8),
}
"""Of the layers' matrices, and of head and tied embedding: a logit errs by all of a row's errors, and a vocabulary is a
third of a small model. By the names of `model.quantization`, which may be `none` or `stored` beside them.
"""

STORED: Mapping[str, Scheme] = {
    "Q8_0": Scheme(bits=8, group_size=32, scale_type="float16"),
    "Q4_0": Scheme(bits=4, group_size=32, scale_type="float16"),
    "Q4_1": Scheme(bits=4, group_size=32, scale_type="float16", offsets=True),
}
"""By the encodings of checkpoints whose blocks a product can read as they are."""


def multiplies_integers(quantization: str) -> bool:
    """Whether activations of layers become integers on a CPU. quantization: as `model.quantization`."""
    layers, _ = SCHEMES.get(quantization, (None, None))
    return layers is not None and layers.activations and not layers.e4m3


def _input_group(unit: int) -> int:
    """Inputs that share a scale: all that do are on one rank in every layout, whose cuts leave `unit` together."""
    group = math.gcd(unit, 64)
    return max(group, OCTET)


def held_bytes(scheme: Scheme | None, param: Param, itemsize: int) -> int:
    """Of a parameter on a rank. scheme: None for one that is held as it is, in numbers of `itemsize` bytes."""
    return param.num_elements * itemsize if scheme is None else scheme.held_bytes(param)


def scheme_of(
    quantization: str, param: Param, entries: Mapping[str, TensorEntry], config: DecoderConfig | None = None
) -> Scheme | None:
    """How a matrix is held, of which `param` may be a part; None for one that is not quantised.

    quantization: as `model.quantization`, but for `auto`. entries: of the checkpoint; what is missing there is as its
    configuration says. Matrices of one product that are stored in several ways are held as none of them.
    """
    if not param.quantisable:
        return None
    if quantization in SCHEMES:
        layers, head = SCHEMES[quantization]
        scheme = head if param.name in ("embed", "head") else layers
        return scheme if not param.unit else scheme._replace(input_group=_input_group(param.unit))
    if quantization == "none":
        return None
    found = {_stored_scheme(piece.tensor, entries, config) for piece in param.slices}
    return found.pop() if len(found) == 1 else None


def _stored_scheme(tensor: str, entries: Mapping[str, TensorEntry], config: DecoderConfig | None) -> Scheme | None:
    entry = entries.get(tensor)
    if entry is not None:
        return entry.packing.scheme if entry.packing is not None else STORED.get(entry.encoding)
    if config is None or config.quantization is None:
        return None
    form = config.quantization.form_of(stored_name(config.family, tensor).removesuffix(".weight"))
    return None if form is None else form.scheme()
