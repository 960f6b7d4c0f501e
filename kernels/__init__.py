"""Compute operators: plain functions on plain tensors, each defined by its PyTorch reference."""

from __future__ import annotations

from phalanx.kernels.gated_mul import gelu_mul, silu_mul
from phalanx.kernels.head_groups import HeadGroups, group_heads
from phalanx.kernels.largest import argmax, top
from phalanx.kernels.linear import linear
from phalanx.kernels.packed import PackedWeight, Packing, Weight, choose_packing, make_packed
from phalanx.kernels.paged_attention import (
    AttentionPlan,
    paged_attention,
    paged_attention_reference,
    plan_attention,
)
from phalanx.kernels.random import gumbel_noise
from phalanx.kernels.rms_norm import add_rms_norm, rms_norm
from phalanx.kernels.rope import rope, rope_frequencies, rope_table
from phalanx.kernels.rope_and_write_kv import rope_and_write_kv, write_kv

__all__ = [
    "AttentionPlan",
    "HeadGroups",
    "PackedWeight",
    "Packing",
    "Weight",
    "add_rms_norm",
    "argmax",
    "choose_packing",
    "gelu_mul",
    "group_heads",
    "gumbel_noise",
    "linear",
    "make_packed",
    "paged_attention",
    "paged_attention_reference",
    "plan_attention",
    "rms_norm",
    "rope",
    "rope_and_write_kv",
    "rope_frequencies",
    "rope_table",
    "silu_mul",
    "top",
    "write_kv",
]
