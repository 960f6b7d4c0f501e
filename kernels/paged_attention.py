"""`paged_attention`: causal attention of many sequences over a KV cache kept in pages (Kwon et al. 2023, arXiv
2309.06180).

`paged_attention_reference` defines it. `paged_attention` computes the same from an `AttentionPlan`, made once a step
and used by every layer, and `HeadGroups`, made once a rank. On CPUs the native operator reads the pages where they lie;
what it gives for a token is the same to the bit, whatever is beside it in the batch, however its prompt is cut into
chunks, and on any number of threads.

Shapes: T tokens of a step, S sequences, P pages a sequence, L positions attended, N query heads and K KV heads of a
rank, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F

from phalanx.kernels import native_cpu
from phalanx.kernels.gathered_attention import GatherPlan, gathered_attention, plan_gathers
from phalanx.kernels.head_groups import HeadGroups

if TYPE_CHECKING:
    from phalanx._native import AttentionSteps


@dataclass(frozen=True)
class PagePlan:
    """Who attends to what in a step, for the native operator. steps: what it keeps of the rest, reading page_tables [S,
    P] int64 where they are. The rest: as for `plan_attention`.
    """

    steps: AttentionSteps
    page_tables: torch.Tensor
    query_lengths: Sequence[int]
    context_lengths: Sequence[int]
    page_size: int
    window: int | None

    @cached_property
    def gathers(self) -> GatherPlan:
        """For what the native operator does not apply to, such as tensors in float64."""
        return plan_gathers(
            self.page_tables,
            self.query_lengths,
            self.context_lengths,
            page_size=self.page_size,
            window=self.window,
            device=self.page_tables.device,
        )


AttentionPlan: TypeAlias = GatherPlan | PagePlan
"""Who attends to what in a step; the same in every layer."""


def paged_attention_reference(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    kv_of_query: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """Attention of each sequence's new tokens over all of its tokens so far, the new ones included.

    query: [T, query_heads, head_dim], the sequences one after another. key_cache, value_cache: [pages, page_size,
    kv_heads, head_dim]; new keys and values are already written. page_tables: [S, P] int64, each sequence's pages in
    order, then anything. query_lengths: new tokens of each sequence. context_lengths: all of its tokens. kv_of_query:
    [query_heads] int64, the KV head of each query head; groups may be unequal, since a rank may hold part of one.
    window: a token sees this many positions back, itself included, or all. logit_softcap: scores are bent to
    tanh(score / cap) * cap, or not.
    Returns [T, query_heads, head_dim].
    """
    outputs = []
    page_size = key_cache.shape[1]
    queries = torch.split(query, list(query_lengths))
    for new_TND, table, length in zip(queries, page_tables, context_lengths, strict=True):
        pages = table[: -(-length // page_size)]
        k_LND = key_cache[pages].flatten(0, 1)[:length].index_select(1, kv_of_query)
        v_LND = value_cache[pages].flatten(0, 1)[:length].index_select(1, kv_of_query)
        key_position = torch.arange(length, device=query.device)
        query_position = key_position[length - len(new_TND) :, None]
        seen = key_position <= query_position
        if window is not None:
            seen &= key_position > query_position - window
        q_NTD, k_NLD, v_NLD = new_TND.transpose(0, 1), k_LND.transpose(0, 1), v_LND.transpose(0, 1)
        if logit_softcap is None:
            out_NTD = F.scaled_dot_product_attention(q_NTD, k_NLD, v_NLD, attn_mask=seen, scale=scale)
        else:
            scores_NTL = torch.tanh(q_NTD @ k_NLD.transpose(1, 2) * (scale / logit_softcap)) * logit_softcap
            out_NTD = scores_NTL.masked_fill(~seen, -math.inf).softmax(-1) @ v_NLD
        outputs.append(out_NTD.transpose(0, 1))
    return torch.cat(outputs)


def plan_attention(
    page_tables: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    *,
    page_size: int,
    window: int | None,
    device: torch.device,
) -> AttentionPlan:
    """page_tables [S, P], query_lengths, context_lengths, window as in `paged_attention_reference`; sequences may come
    in any order. What the plan holds is on `device`; page_tables may not be changed while it is used.
    """
    if not native_cpu.applies_on(device):
        return plan_gathers(
            page_tables, query_lengths, context_lengths, page_size=page_size, window=window, device=device
        )
    if page_tables.stride(1) != 1:
        page_tables = page_tables.contiguous()
    steps = native_cpu.LIBRARY.AttentionSteps(
        page_tables.data_ptr(), page_tables.stride(0), query_lengths, context_lengths, window or 0
    )
    return PagePlan(steps, page_tables, query_lengths, context_lengths, page_size, window)


def paged_attention(
    query_TND: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan,
    heads: HeadGroups,
    *,
    scale: float,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """`paged_attention_reference` of the sequences of `plan`, to rounding.

    query_TND and the caches share a dtype; all may be strided. What a cache holds where no sequence has written, NaN
    included, does not reach the output. Returns [T, N, D].
    """
    if isinstance(plan, PagePlan):
        code = native_cpu.code_of(query_TND)
        page_stride, slot_stride, head_stride, step = key_cache.stride()
        alike = value_cache.stride() == key_cache.stride()
        if code is not None and heads.native is not None and alike and step == 1:
            if query_TND.stride()[1:] != (query_TND.shape[2], 1):
                query_TND = query_TND.contiguous()
            num_tokens, num_heads, head_dim = query_TND.shape
            out_TND = query_TND.new_empty((num_tokens, num_heads, head_dim))
            plan.steps.attend(
                heads.native,
                out_TND.data_ptr(),
                query_TND.data_ptr(),
                key_cache.data_ptr(),
                value_cache.data_ptr(),
                query_TND.stride(0),
                num_heads * head_dim,
                key_cache.shape[1],
                page_stride,
                slot_stride,
                head_stride,
                head_dim,
                scale,
                logit_softcap or 0.0,
                code,
            )
            return out_TND
        plan = plan.gathers
    return gathered_attention(query_TND, key_cache, value_cache, plan, heads, scale=scale, logit_softcap=logit_softcap)
