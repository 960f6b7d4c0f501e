"""`rope_and_attend`: all of attention between its two products: `rope_and_write_kv`, then `paged_attention`.

Shapes: T tokens of a step, N query heads and K KV heads of a rank, D head dimension.
"""

from __future__ import annotations

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.device_plan import DevicePlan
from phalanx.kernels.head_groups import HeadGroups
from phalanx.kernels.kv_format import KVScales, check_scales
from phalanx.kernels.paged_attention import AttentionPlan, paged_attention
from phalanx.kernels.rope_and_write_kv import rope_and_write_kv


def rope_and_attend(
    qkv: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor],
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    plan: AttentionPlan,
    heads: HeadGroups,
    *,
    scale: float,
    logit_softcap: float | None = None,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """qkv [T, (N + 2 K) * D], which may be overwritten -> [T, N, D]. The new keys and values are in the caches then.

    The arguments are those of the two; slots are the places of the plan's tokens.
    """
    if isinstance(plan, DevicePlan) and plan.most_new == 1:
        check_scales(key_cache, kv_scales)
        return triton_gpu.find_triton().operators.rope_and_attend(  # type: ignore[no-any-return]
            qkv,
            table,
            key_cache,
            value_cache,
            plan,
            heads,
            scale=scale,
            logit_softcap=logit_softcap,
            q_norm=q_norm,
            k_norm=k_norm,
            eps=eps,
            kv_scales=kv_scales,
        )
    query_TND = rope_and_write_kv(
        qkv, table, key_cache, value_cache, slots, q_norm=q_norm, k_norm=k_norm, eps=eps, kv_scales=kv_scales
    )
    return paged_attention(
        query_TND,
        key_cache,
        value_cache,
        plan,
        heads,
        scale=scale,
        logit_softcap=logit_softcap,
        kv_scales=kv_scales,
    )
