"""Compute operators: plain functions on plain tensors, each defined by its PyTorch reference."""

from __future__ import annotations

from phalanx.kernels.activations import (
    Activations,
    Norm,
    QuantisedActivations,
    QuantisingNorm,
    add_normed,
    normed,
    plain_norm,
    silu_gated,
)
from phalanx.kernels.compiled import compiled_names, use_compiler
from phalanx.kernels.cuda_graphs import CudaGraphs, Graph, Graphs
from phalanx.kernels.device_plan import DevicePlan, PlanRoom
from phalanx.kernels.embedding import embedding
from phalanx.kernels.gated_mul import gelu_mul, gelu_mul_quantised, silu_mul, silu_mul_quantised
from phalanx.kernels.head_groups import HeadGroups, group_heads
from phalanx.kernels.kv_format import KV_DTYPES, KVScales, dequantise_kv, quantise_kv, told_of_kv
from phalanx.kernels.largest import argmax, argmax_keys, columns_of_keys, top
from phalanx.kernels.layer_norm import add_layer_norm, add_layer_norm_quantised, layer_norm, layer_norm_quantised
from phalanx.kernels.linear import gated_linear, linear, linear_add, linear_part
from phalanx.kernels.mixture import Experts, PackedExperts, expert_ffn, route
from phalanx.kernels.packed import PackedWeight, Packing, Weight, choose_packing, is_native, make_packed, taken_by
from phalanx.kernels.paged_attention import (
    AttentionPlan,
    PagePlan,
    paged_attention,
    paged_attention_reference,
    plan_attention,
    plan_room,
)
from phalanx.kernels.quantise import quantise
from phalanx.kernels.quantised_rows import quantise_rows
from phalanx.kernels.quantised_weight import (
    QuantisedRows,
    QuantisedWeight,
    WeightFormat,
    dequantise,
    make_quantised,
    told_of_quantised,
)
from phalanx.kernels.random import gumbel_noise
from phalanx.kernels.recording import Arena, NotRecordableError, Recording
from phalanx.kernels.rms_norm import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised
from phalanx.kernels.rope import rope, rope_frequencies, rope_table
from phalanx.kernels.rope_and_attend import rope_and_attend
from phalanx.kernels.rope_and_write_kv import rope_and_write_kv, write_kv
from phalanx.kernels.sample import SamplingRows, sample
from phalanx.kernels.token_places import fill_token_places, planned_places, token_places
from phalanx.kernels.weight_on_gpu import make_quantised_on, told_on_gpu
from phalanx.kernels.widen import widen

__all__ = [
    "KV_DTYPES",
    "Activations",
    "Arena",
    "AttentionPlan",
    "CudaGraphs",
    "DevicePlan",
    "Experts",
    "Graph",
    "Graphs",
    "HeadGroups",
    "KVScales",
    "Norm",
    "NotRecordableError",
    "PackedExperts",
    "PackedWeight",
    "Packing",
    "PagePlan",
    "PlanRoom",
    "QuantisedActivations",
    "QuantisedRows",
    "QuantisedWeight",
    "QuantisingNorm",
    "Recording",
    "SamplingRows",
    "Weight",
    "WeightFormat",
    "add_layer_norm",
    "add_layer_norm_quantised",
    "add_normed",
    "add_rms_norm",
    "add_rms_norm_quantised",
    "argmax",
    "argmax_keys",
    "choose_packing",
    "columns_of_keys",
    "compiled_names",
    "dequantise",
    "dequantise_kv",
    "embedding",
    "expert_ffn",
    "fill_token_places",
    "gated_linear",
    "gelu_mul",
    "gelu_mul_quantised",
    "group_heads",
    "gumbel_noise",
    "is_native",
    "layer_norm",
    "layer_norm_quantised",
    "linear",
    "linear_add",
    "linear_part",
    "make_packed",
    "make_quantised",
    "make_quantised_on",
    "normed",
    "paged_attention",
    "paged_attention_reference",
    "plain_norm",
    "plan_attention",
    "plan_room",
    "planned_places",
    "quantise",
    "quantise_kv",
    "quantise_rows",
    "rms_norm",
    "rms_norm_quantised",
    "rope",
    "rope_and_attend",
    "rope_and_write_kv",
    "rope_frequencies",
    "rope_table",
    "route",
    "sample",
    "silu_gated",
    "silu_mul",
    "silu_mul_quantised",
    "taken_by",
    "token_places",
    "told_of_kv",
    "told_of_quantised",
    "told_on_gpu",
    "top",
    "use_compiler",
    "widen",
    "write_kv",
]
