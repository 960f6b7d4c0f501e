"""Checkpoints as AutoAWQ, GPTQ, FP8 quantisers and llm-compressor write them: packed here from the published formats.

Sources: AutoAWQ's gemm (awq/modules/linear/gemm.py), AutoGPTQ's QuantLinear and GPTQModel's second format, the
README_WEIGHTS.md of DeepSeek-V3, pack_quantized, int_quantized and float_quantized of compressed-tensors.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Parts = dict[str, torch.Tensor]
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Quantised(NamedTuple):
    """A matrix [N, K] as its format stores it, by suffix, and what that stands for, [N, K] float64."""

    parts: Parts
    exact: torch.Tensor


class Integers(NamedTuple):
    """q [N, K] and zeros [N, G] from 0 to 2^bits - 1, scales [N, G], and the group of each input [K]."""

    q: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor

    @property
    def exact(self) -> torch.Tensor:
        return self.scales.double()[:, self.g_idx] * (self.q - self.zeros[:, self.g_idx]).double()


def scattered(num_inputs: int, seed: int, size: int = GROUP) -> torch.Tensor:
    """The group of each input, [K], where an act-order has taken the inputs in an order of its own."""
    order = torch.randperm(num_inputs, generator=torch.Generator().manual_seed(seed))
    return torch.empty(num_inputs, dtype=torch.int64).scatter_(0, order, torch.arange(num_inputs) // size)


def round_to_integers(
    w: torch.Tensor,
    bits: int,
    *,
    size: int | None = GROUP,
    symmetric: bool = False,
    g_idx: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float16,
) -> Integers:
    num_inputs = w.shape[1]
    if g_idx is None:
        g_idx = torch.arange(num_inputs) // (size or num_inputs)
    scales, zeros, most = [], [], 2**bits - 1
    for group in range(int(g_idx.max()) + 1):
        x = w[:, g_idx == group]
        low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
        scale = x.abs().amax(1) * 2 / most if symmetric else (high - low) / most
        scales.append(scale.to(dtype))
        zeros.append(torch.full_like(low, (most + 1) // 2) if symmetric else (-low / scale).round())
    scale_NG, zero_NG = torch.stack(scales, 1), torch.stack(zeros, 1).long()
    q = (w / scale_NG.float()[:, g_idx] + zero_NG[:, g_idx]).round().clamp(0, most).long()
    return Integers(q, scale_NG, zero_NG, g_idx)


def words(values: torch.Tensor, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """[..., n] to [..., n * bits / 32] int32, filled up with zeros; order: whose value lies at each place."""
    each = 32 // bits
    array = values.numpy().astype(np.uint64)
    array = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, -array.shape[-1] % each)])
    array = array.reshape(*array.shape[:-1], -1, each)
    packed = sum(array[..., value] << np.uint64(bits * place) for place, value in enumerate(order or range(each)))
    return torch.from_numpy(np.asarray(packed).astype(np.uint32).view(np.int32).copy())


def awq(w: torch.Tensor, size: int | None = GROUP) -> Quantised:
    found = round_to_integers(w, 4, size=size)
    parts = {
        "qweight": words(found.q.t(), 4, AWQ_ORDER),
        "qzeros": words(found.zeros.t(), 4, AWQ_ORDER),
        "scales": found.scales.t(),
    }
    return Quantised(parts, found.exact)


def gptq(w: torch.Tensor, bits: int, *, symmetric: bool, g_idx: torch.Tensor | None = None, step: int = 1) -> Quantised:
    """step: what is taken off a zero before it is stored; by the first format 1."""
    found = round_to_integers(w, bits, symmetric=symmetric, g_idx=g_idx)
    parts = {
        "qweight": words(found.q, bits).t(),
        "qzeros": words((found.zeros.t() - step) & (2**bits - 1), bits),
        "scales": found.scales.t(),
        "g_idx": found.g_idx.int(),
    }
    return Quantised(parts, found.exact)


def pack_quantized(
    w: torch.Tensor, bits: int, *, symmetric: bool, size: int | None = GROUP, g_idx: torch.Tensor | None = None
) -> Quantised:
    found = round_to_integers(w, bits, symmetric=symmetric, size=size, g_idx=g_idx, dtype=torch.bfloat16)
    parts = {
        "weight_packed": words(found.q, bits),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor(w.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = words(found.zeros.t(), bits).t()
    if g_idx is not None:
        parts["weight_g_idx"] = g_idx.int()
    return Quantised(parts, found.exact)


def int_quantized(w: torch.Tensor, *, symmetric: bool = True) -> Quantised:
    found = round_to_integers(w, 8, symmetric=symmetric, size=None, dtype=torch.bfloat16)
    parts = {"weight": (found.q - 128).to(torch.int8), "weight_scale": found.scales}
    if not symmetric:
        parts["weight_zero_point"] = (found.zeros - 128).to(torch.int8)
    return Quantised(parts, found.exact)


def fp8(
    w: torch.Tensor,
    rows: int,
    columns: int,
    scale_name: str = "weight_scale",
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] | None = None,
) -> Quantised:
    """With a scale for so many rows and columns. shape: of the tensor of scales."""
    blocks = -(-w.shape[0] // rows), -(-w.shape[1] // columns)
    scales = torch.empty(blocks, dtype=dtype)
    q = torch.empty(w.shape, dtype=torch.float8_e4m3fn)
    exact = torch.empty(w.shape, dtype=torch.float64)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            at = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = w[at].abs().max() / 400
            q[at] = (w[at] / scales[i, j].float()).to(torch.float8_e4m3fn)
            exact[at] = q[at].double() * scales[i, j].double()
    return Quantised({"weight": q, scale_name: scales.reshape(blocks if shape is None else shape)}, exact)


class Form(NamedTuple):
    """config: `quantization_config`. pack: of a matrix, and the groups of its inputs if they are scattered."""

    config: dict[str, Any]
    pack: Callable[[torch.Tensor, torch.Tensor], Quantised]


def _compressed(format_: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": format_,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }


_AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm", "zero_point": True}
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True, "desc_act": False}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}

FORMS: Mapping[str, Form] = {
    "awq": Form(_AWQ, lambda w, _: awq(w)),
    "awq by output": Form(_AWQ | {"group_size": -1}, lambda w, _: awq(w, None)),
    "gptq": Form(_GPTQ, lambda w, _: gptq(w, 4, symmetric=True)),
    "gptq act-order": Form(
        _GPTQ | {"desc_act": True, "sym": False}, lambda w, g_idx: gptq(w, 4, symmetric=False, g_idx=g_idx)
    ),
    "gptq_v2 8 bits": Form(
        _GPTQ | {"bits": 8, "sym": False, "checkpoint_format": "gptq_v2"},
        lambda w, _: gptq(w, 8, symmetric=False, step=0),
    ),
    "fp8 blocks": Form(
        _FP8 | {"weight_block_size": [48, 32]}, lambda w, _: fp8(w, 48, 32, "weight_scale_inv", torch.bfloat16)
    ),
    "fp8": Form(_FP8 | {"activation_scheme": "static"}, lambda w, _: fp8(w, w.shape[0], w.shape[1], shape=())),
    "compressed W4A16": Form(
        _compressed("pack-quantized", strategy="group", group_size=GROUP),
        lambda w, _: pack_quantized(w, 4, symmetric=True),
    ),
    "compressed W4A16 act-order": Form(
        _compressed("pack-quantized", strategy="group", group_size=GROUP, symmetric=False, actorder="group"),
        lambda w, g_idx: pack_quantized(w, 4, symmetric=False, g_idx=g_idx),
    ),
    "compressed W8A16": Form(
        _compressed("pack-quantized", num_bits=8, strategy="channel", symmetric=False),
        lambda w, _: pack_quantized(w, 8, symmetric=False, size=None),
    ),
    "compressed W8A8": Form(
        _compressed("int-quantized", num_bits=8, strategy="channel"), lambda w, _: int_quantized(w)
    ),
    "compressed FP8": Form(
        _compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda w, _: fp8(w, 1, w.shape[1], dtype=torch.bfloat16),
    ),
}


def quantise_model(plain: Path, form: Form, directory: Path) -> Path:
    """A model of one file, its layers quantised into `directory`; returns a directory with what that stands for."""
    config = json.loads((plain / "config.json").read_text())
    exact = directory / "exact"
    exact.mkdir(parents=True)
    for folder, settings in ((directory, {"quantization_config": form.config}), (exact, {})):
        (folder / "config.json").write_text(json.dumps(config | settings))
        (folder / "tokenizer.json").write_bytes((plain / "tokenizer.json").read_bytes())
    stored: Parts = {}
    stands_for: Parts = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        stored[name] = stands_for[name] = tensor
        module = re.fullmatch(r"(.*\.)(\w+_proj|w[123])\.weight", name)
        if module is not None:
            # Projections of the same inputs have the same order, as they are quantised by the same statistics.
            inputs = module[1] + ("out" if module[2] in ("o_proj", "down_proj", "w2") else "in")
            g_idx = scattered(tensor.shape[1], zlib.crc32(inputs.encode()))
            parts, whole = form.pack(tensor.float(), g_idx)
            stored |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
            stands_for[name] = whole.float()
            if "weight" not in parts:
                del stored[name]
    save_file({name: part.contiguous() for name, part in stored.items()}, directory / "model.safetensors")
    save_file(stands_for, exact / "model.safetensors", {"format": "pt"})
    return exact
