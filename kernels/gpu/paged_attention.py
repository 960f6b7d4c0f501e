"""Attention of a step: decodes and chunks, each by their kernel, into one output."""

from __future__ import annotations

from typing import Any

import torch

from phalanx.kernels.device_plan import DevicePlan
from phalanx.kernels.gpu.decode_attention import decode_attention, rope_and_decode
from phalanx.kernels.gpu.prefill_attention import prefill_attention
from phalanx.kernels.head_groups import HeadGroups

UNKNOWN = 2**31 - 1  # positions that a plan which stands for any step may have to attend to

Scales = tuple[torch.Tensor, torch.Tensor]


def _longest(plan: DevicePlan) -> int:
    return UNKNOWN if plan.longest is None else plan.longest


def paged_attention(
    query_TND: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DevicePlan,
    heads: HeadGroups,
    *,
    scale: float,
    logit_softcap: float | None,
    kv_scales: Scales | None,
) -> torch.Tensor:
    """As `phalanx.kernels.paged_attention`, which calls it."""
    out_TND = query_TND.new_empty(query_TND.shape)
    tensors = (out_TND, query_TND, key_cache, value_cache)
    key_scales, value_scales = kv_scales or (None, None)
    settings: dict[str, Any] = {
        "group": heads.group_size,
        "scale": scale,
        "window": plan.window or 0,
        "logit_softcap": logit_softcap or 0.0,
    }
    if plan.num_decodes:
        counters = plan.room.counters(heads.num_kv_heads)
        decode_attention(
            *tensors,
            plan.decodes,
            plan.pages,
            counters,
            heads.table,
            key_scales,
            value_scales,
            **settings,
            longest=_longest(plan),
        )
    if plan.most_new > 1:
        prefill_attention(
            *tensors,
            plan.chunks,
            plan.pages,
            heads.table,
            key_scales,
            value_scales,
            **settings,
            most_new=plan.most_new,
        )
    return out_TND


def rope_and_attend(
    qkv: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor],
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: DevicePlan,
    heads: HeadGroups,
    *,
    scale: float,
    logit_softcap: float | None,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    kv_scales: Scales | None,
) -> torch.Tensor:
    """As `phalanx.kernels.rope_and_attend`, which calls it, for a step of nothing but decodes."""
    num_kv, head_dim = key_cache.shape[2:]
    out_TND = qkv.new_empty((len(qkv), qkv.shape[1] // head_dim - 2 * num_kv, head_dim))
    rope_and_decode(
        out_TND,
        qkv,
        *table,
        q_norm,
        k_norm,
        key_cache,
        value_cache,
        plan.decodes,
        plan.pages,
        plan.room.counters(heads.num_kv_heads),
        heads.table,
        *(kv_scales or (None, None)),
        group=heads.group_size,
        scale=scale,
        eps=eps,
        window=plan.window or 0,
        logit_softcap=logit_softcap or 0.0,
        longest=_longest(plan),
    )
    return out_TND
