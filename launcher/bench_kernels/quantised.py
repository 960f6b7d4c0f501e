"""Products by quantised weights, and what stands beside them: the same product by weights that are not, and PyTorch's
own by the same numbers where it has one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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


def quantised(plain: torch.Tensor, held: WeightFormat) -> QuantisedWeight:
    """plain: [N, K]."""
    shapes, formats = [plain.shape], [held]
    if plain.device.type == "cuda":
        [weight] = kernels.make_quantised_on(plain.device, shapes, formats, plain.dtype)
    else:
        [weight] = kernels.make_quantised(shapes, formats, plain.dtype)
    weight.put(0, kernels.quantise(plain, held))
    return weight


def taken(x: torch.Tensor, weight: QuantisedWeight) -> Activations:
    """x as the norm or the gate in front gives it."""
    return x if weight.takes is None else QuantisedActivations(*kernels.quantise_rows(x, weight.takes))


def peers(
    name: Held, x: torch.Tensor, plain: torch.Tensor, held: WeightFormat
) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call) by the same weight."""
    yield "torch", lambda: F.linear(x, plain)
    if x.device.type != "cuda":
        return
    if name == "fp8_w8a8" and torch.cuda.get_device_capability(x.device) >= (8, 9):
        a, w = (kernels.quantise_rows(each, torch.float8_e4m3fn) for each in (x, plain))
        scales = a[1].unsqueeze(1), w[1].unsqueeze(0)
        yield "torch._scaled_mm", lambda: _scaled_mm(a[0], w[0].t(), *scales, out_dtype=x.dtype)
    if name == "w4a16" and x.dtype == torch.bfloat16 and plain.shape[1] % 128 == 0 and plain.shape[0] % 8 == 0:
        packed, scales_and_zeros = _int4pack(plain, held)
        group = held.group_of(plain.shape[1])
        yield "torch._weight_int4pack_mm", lambda: _weight_int4pack_mm(x, packed, group, scales_and_zeros)


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
