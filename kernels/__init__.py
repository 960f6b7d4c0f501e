"""Compute operators: plain functions on plain tensors, each defined by its PyTorch reference."""

from __future__ import annotations

from phalanx.kernels.linear import linear
from phalanx.kernels.packed import PackedWeight, Packing, Weight, choose_packing, make_packed
from phalanx.kernels.paged_attention import (
    AttentionPlan,
    HeadGroups,
    group_heads,
    paged_attention,
    paged_attention_reference,
    plan_attention,
    write_kv,
)
from phalanx.kernels.random import gumbel_noise
from phalanx.kernels.rms_norm import rms_norm
from phalanx.kernels.rope import rope, rope_frequencies, rope_table
from phalanx.kernels.silu_mul import silu_mul

__all__ = [
    "AttentionPlan",
    "HeadGroups",
    "PackedWeight",
    "Packing",
    "Weight",
    "choose_packing",
    "group_heads",
    "gumbel_noise",
    "linear",
    "make_packed",
    "paged_attention",
    "paged_attention_reference",
    "plan_attention",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rope_table",
    "silu_mul",
    "write_kv",
]
