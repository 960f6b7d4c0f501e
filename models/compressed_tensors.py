"""Matrices and their `quantization_config` as compressed-tensors stores them, which llm-compressor and vLLM read.

Formats: pack_quantized and float_quantized of https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from phalanx.kernels import QuantisedRows, WeightFormat
from phalanx.models.safetensors_writer import TensorPlan, encoding_of

SAVED_SCHEMES = ("int8", "int4", "fp8")

_WORD_BITS = 32


@dataclass(frozen=True, slots=True)
class SavedForm:
    """How the layers' matrices are saved. format: as compressed-tensors calls it. activations: whether a runtime that
    can multiplies by activations quantised likewise, with a scale a token.
    """

    format: str
    held: WeightFormat
    activations: bool = False

    def config(self, ignored: Sequence[str]) -> dict[str, Any]:
        """The `quantization_config`. ignored: modules that stay as they are."""
        held = self.held
        kind = {"num_bits": held.bits, "type": "float" if held.e4m3 else "int"}
        grouped = held.group_size is not None
        weights = kind | {
            "symmetric": not held.zeros,
            "strategy": "group" if grouped else "channel",
            "group_size": held.group_size,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
        }
        activations = kind | {"symmetric": True, "strategy": "token", "dynamic": True, "group_size": None}
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": activations if self.activations else None,
            "output_activations": None,
        }
        return {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": list(ignored),
            "kv_cache_scheme": None,
        }

    def plan(self, num_outputs: int, num_inputs: int) -> Mapping[str, TensorPlan]:
        """The tensors of a matrix, by what is behind the name of its module."""
        held = self.held
        groups = held.num_groups(num_inputs)
        scales = {"weight_scale": TensorPlan(encoding_of(held.scale_dtype), (num_outputs, groups))}
        if held.e4m3:
            return {"weight": TensorPlan("F8_E4M3", (num_outputs, num_inputs)), **scales}
        each = _WORD_BITS // held.bits
        found = {
            "weight_packed": TensorPlan("I32", (num_outputs, -(-num_inputs // each))),
            "weight_shape": TensorPlan("I64", (2,)),
            **scales,
        }
        if held.zeros:
            found["weight_zero_point"] = TensorPlan("I32", (-(-num_outputs // each), groups))
        return found

    def pack(self, rows: QuantisedRows) -> Mapping[str, torch.Tensor]:
        """All rows of a matrix, quantised as `held`, as the tensors of its plan."""
        held = self.held
        if held.e4m3:
            return {"weight": rows.q.view(torch.float8_e4m3fn), "weight_scale": rows.scales}
        unsigned = rows.q if held.zeros else rows.q.view(torch.uint8) + (1 << (held.bits - 1))
        found = {
            "weight_packed": _words(unsigned.view(torch.uint8), held.bits),
            "weight_shape": torch.tensor(rows.q.shape),
            "weight_scale": rows.scales,
        }
        if rows.zeros is not None:
            found["weight_zero_point"] = _words(rows.zeros.t(), held.bits).t()
        return found


def saved_form(scheme: str, group_size: int, scale_dtype: torch.dtype) -> SavedForm:
    """Of one of SAVED_SCHEMES.

    int8: W8A16, a scale an output. int4: W4A16, a scale and a zero for `group_size` inputs. fp8: E4M3 with a scale an
    output; runtimes that have units for it quantise activations, too, as its published form (FP8_DYNAMIC) says.
    """
    match scheme:
        case "int8":
            return SavedForm("pack-quantized", WeightFormat(8, None, scale_dtype))
        case "int4":
            return SavedForm("pack-quantized", WeightFormat(4, group_size, scale_dtype, zeros=True))
        case "fp8":
            return SavedForm("float-quantized", WeightFormat(8, None, scale_dtype, e4m3=True), activations=True)
    raise ValueError(f"{scheme!r} is none of {SAVED_SCHEMES}")


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, n] uint8 -> [R, ceil(n * bits / 32)] int32, from the lowest bits on, filled up with zeros."""
    missing = -values.shape[1] % (_WORD_BITS // bits)
    octets = F.pad(values, (0, missing)).contiguous()
    if bits == 4:
        octets = octets[:, ::2] | octets[:, 1::2] << 4
    return octets.view(torch.int32)
