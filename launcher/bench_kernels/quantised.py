"""Products by quantised weights, and what stands beside them: the same product by weights that are not, and PyTorch's
own by the same numbers where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from phalanx import kernels
from phalanx.kernels import Activations, QuantisedActivations, QuantisedWeight, WeightFormat
from phalanx.kernels.linear_table import Held
from phalanx.kernels.tune_linear import FORMATS

ON_CPUS: tuple[Held, ...] = ("w4a16", "w8a16")  # what native products multiply by


def formats_on(device: torch.device) -> Mapping[Held, WeightFormat]:
    return FORMATS if device.type == "cuda" else {name: FORMATS[name] for name in ON_CPUS}


def quantised(plain: torch.Tensor, held: WeightFormat, num_copies: int) -> list[QuantisedWeight]:
    """plain: [N, K]."""
    if plain.device.type == "cuda":
        weights = kernels.make_quantised_on(plain.device, plain.shape, held, plain.dtype, [None] * num_copies)
    else:
        weights = kernels.make_quantised([plain.shape] * num_copies, [held] * num_copies, plain.dtype)
    rows = kernels.quantise(plain, held)
    for weight in weights:
        weight.put(0, rows)
    return weights


def taken(x: torch.Tensor, weight: QuantisedWeight) -> Activations:
    """x as the norm or the gate in front gives it."""
    return x if weight.takes is None else QuantisedActivations(*kernels.quantise_rows(x, weight.takes))


def peers(
    name: Held, x: torch.Tensor, plains: Sequence[torch.Tensor], held: WeightFormat
) -> Iterator[tuple[str, Callable[[int], object]]]:
    """(name, call with the number of any copy). plains: copies, so many that they are found in no cache."""
    num, plain = len(plains), plains[0]
    yield "torch", lambda i: F.linear(x, plains[i % num])
    if x.device.type != "cuda":
        return
    if name == "fp8_w8a8" and torch.cuda.get_device_capability(x.device) >= (8, 9):
        a, a_scales = kernels.quantise_rows(x, torch.float8_e4m3fn)
        made = [kernels.quantise_rows(each, torch.float8_e4m3fn) for each in plains]
        others = [(w.t(), a_scales.unsqueeze(1), scales.unsqueeze(0)) for w, scales in made]
        yield "torch._scaled_mm", lambda i: _scaled_mm(a, *others[i % num], out_dtype=x.dtype)
    if name == "w4a16" and x.dtype == torch.bfloat16 and plain.shape[1] % 128 == 0 and plain.shape[0] % 8 == 0:
        packed, scales_and_zeros = _int4pack(plain, held)
        each = [packed.clone() for _ in plains]
        group = held.group_of(plain.shape[1])
        yield "torch._weight_int4pack_mm", lambda i: _weight_int4pack_mm(x, each[i % num], group, scales_and_zeros)


def _int4pack(plain: torch.Tensor, held: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers as PyTorch's operator wants them: two in a byte, the first in the higher bits; it adds a zero that
    belongs to the middle of the range, 8.
    """
    rows = kernels.quantise(plain, held)
    assert rows.offsets is not None
    q = rows.q.to(torch.uint8)
    packed = _convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
    middle = rows.offsets.float() + 8 * rows.scales.float()
    scales_and_zeros = torch.stack([rows.scales.float(), middle], -1).transpose(0, 1).contiguous().to(plain.dtype)
    return packed, scales_and_zeros


# PyTorch has no types for these.
_scaled_mm: Any = torch._scaled_mm
_weight_int4pack_mm: Any = torch._weight_int4pack_mm
_convert_weight_to_int4pack: Any = torch._convert_weight_to_int4pack
