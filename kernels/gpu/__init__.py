"""Operators in Triton, for tensors on a GPU. `phalanx.kernels` calls them; importing this package needs Triton.

A file an operator: kernels, the launcher, and `EXAMPLES` of launches for the check by `ahead_of_time`. A launcher is a
plain function on plain tensors, which `operator` also registers as `torch.ops.phalanx.<name>`.
"""

from __future__ import annotations

from phalanx.kernels.gpu.decode_attention import decode_attention, rope_and_decode
from phalanx.kernels.gpu.embedding import embedding
from phalanx.kernels.gpu.expert_ffn import expert_ffn
from phalanx.kernels.gpu.expert_ffn_quantised import expert_ffn_quantised
from phalanx.kernels.gpu.gated_mul import gelu_mul, gelu_mul_quantised, silu_mul, silu_mul_quantised
from phalanx.kernels.gpu.largest import argmax, top
from phalanx.kernels.gpu.layer_norm import add_layer_norm, add_layer_norm_quantised, layer_norm, layer_norm_quantised
from phalanx.kernels.gpu.linear import gated_linear, linear, linear_add
from phalanx.kernels.gpu.linear_fp8_w8a8 import linear_fp8_w8a8
from phalanx.kernels.gpu.linear_fp8_w8a16 import linear_fp8_w8a16
from phalanx.kernels.gpu.linear_w4a16 import int4_shape, linear_w4a16, pack_int4, unpack_int4
from phalanx.kernels.gpu.linear_w8a8 import linear_w8a8
from phalanx.kernels.gpu.linear_w8a16 import linear_w8a16
from phalanx.kernels.gpu.narrow import narrows_on
from phalanx.kernels.gpu.paged_attention import paged_attention, rope_and_attend
from phalanx.kernels.gpu.prefill_attention import prefill_attention
from phalanx.kernels.gpu.quantise_rows import quantise_rows
from phalanx.kernels.gpu.rms_norm import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised
from phalanx.kernels.gpu.rope import rope_table
from phalanx.kernels.gpu.rope_and_write_kv import rope_and_write_kv
from phalanx.kernels.gpu.route import route
from phalanx.kernels.gpu.sample import sample
from phalanx.kernels.gpu.token_places import token_places

__all__ = [
    "add_layer_norm",
    "add_layer_norm_quantised",
    "add_rms_norm",
    "add_rms_norm_quantised",
    "argmax",
    "decode_attention",
    "embedding",
    "expert_ffn",
    "expert_ffn_quantised",
    "gated_linear",
    "gelu_mul",
    "gelu_mul_quantised",
    "int4_shape",
    "layer_norm",
    "layer_norm_quantised",
    "linear",
    "linear_add",
    "linear_fp8_w8a8",
    "linear_fp8_w8a16",
    "linear_w4a16",
    "linear_w8a8",
    "linear_w8a16",
    "narrows_on",
    "pack_int4",
    "paged_attention",
    "prefill_attention",
    "quantise_rows",
    "rms_norm",
    "rms_norm_quantised",
    "rope_and_attend",
    "rope_and_decode",
    "rope_and_write_kv",
    "rope_table",
    "route",
    "sample",
    "silu_mul",
    "silu_mul_quantised",
    "token_places",
    "top",
    "unpack_int4",
]
