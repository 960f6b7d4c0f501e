"""`paged_attention`: causal attention of many sequences over a KV cache kept in pages (Kwon et al. 2023, arXiv
2309.06180).

`paged_attention_reference` defines it. `paged_attention` computes the same from an `AttentionPlan`, made once a step
and used by every layer, and `HeadGroups`, made once a rank. On GPUs the operators in Triton do, by a `DevicePlan`. On
CPUs the native operator reads the pages where they lie; what it gives for a token is the same to the bit, whatever is
beside it in the batch, however its prompt is cut into chunks, and on any number of threads.

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

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.device_plan import DevicePlan, PlanRoom, plan_on_device
from phalanx.kernels.gathered_attention import GatherPlan, gathered_attention, plan_gathers
from phalanx.kernels.head_groups import HeadGroups
from phalanx.kernels.kv_format import (
    KVScales,
    as_bytes,
    check_scales,
    dequantise_kv,
    native_scales,
    scales_of_slots,
)

if TYPE_CHECKING:
    from phalanx._native import AttentionSteps


@dataclass(eq=False)
class PagePlan:
    """Who attends to what in a step, for the native operator. steps: what it keeps of the rest, reading page_tables [.,
    P] int64 where they are. The rest: as for `plan_attention`.
    """

    steps: AttentionSteps
    page_tables: torch.Tensor
    rows: Sequence[int]
    query_lengths: Sequence[int]
    context_lengths: Sequence[int]
    page_size: int
    window: int | None

    def move(self, rows: Sequence[int], context_lengths: Sequence[int]) -> None:
        """On to another step: of as many sequences, each with as many new tokens."""
        self.rows, self.context_lengths = rows, context_lengths
        self.__dict__.pop("gathers", None)
        self.steps.move(
            self.page_tables.data_ptr(),
            self.page_tables.stride(0),
            rows,
            self.query_lengths,
            context_lengths,
            self.window or 0,
        )

    @cached_property
    def gathers(self) -> GatherPlan:
        """For what the native operator does not apply to, such as tensors in float64."""
        return plan_gathers(
            self.page_tables[list(self.rows)],
            self.query_lengths,
            self.context_lengths,
            page_size=self.page_size,
            window=self.window,
            device=self.page_tables.device,
        )


AttentionPlan: TypeAlias = GatherPlan | PagePlan | DevicePlan
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
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """Attention of each sequence's new tokens over all of its tokens so far, the new ones included.

    query: [T, query_heads, head_dim], the sequences one after another. key_cache, value_cache: [pages, page_size,
    kv_heads, head_dim]; new keys and values are already written. page_tables: [S, P] int64, each sequence's pages in
    order, then anything. query_lengths: new tokens of each sequence. context_lengths: all of its tokens. kv_of_query:
    [query_heads] int64, the KV head of each query head; groups may be unequal, since a rank may hold part of one.
    window: a token sees this many positions back, itself included, or all. logit_softcap: scores are bent to
    tanh(score / cap) * cap, or not. kv_scales: of caches in 8 bits, whose numbers they are multiplied by.
    Returns [T, query_heads, head_dim].
    """
    outputs = []
    check_scales(key_cache, kv_scales)
    key_scales, value_scales = kv_scales or (None, None)

    def tokens(cache: torch.Tensor, scales: torch.Tensor | None, pages: torch.Tensor) -> torch.Tensor:
        found = as_bytes(cache)[pages].view(cache.dtype).flatten(0, 1)
        if scales is None:
            return found
        return dequantise_kv(found, scales_of_slots(scales)[pages].flatten(0, 1), query.dtype)

    page_size = key_cache.shape[1]
    queries = torch.split(query, list(query_lengths))
    for new_TND, table, length in zip(queries, page_tables, context_lengths, strict=True):
        pages = table[: -(-length // page_size)]
        k_LND = tokens(key_cache, key_scales, pages)[:length].index_select(1, kv_of_query)
        v_LND = tokens(value_cache, value_scales, pages)[:length].index_select(1, kv_of_query)
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


def plan_room(max_sequences: int, max_pages: int, device: torch.device) -> PlanRoom | None:
    """Where plans of steps lie, of up to so many sequences with so many pages each; None where they need none."""
    if not triton_gpu.applies_on(device):
        return None
    return PlanRoom(max_sequences, max_sequences * max_pages, device)


def plan_attention(
    page_tables: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    *,
    page_size: int,
    window: int | None,
    device: torch.device,
    rows: Sequence[int] | None = None,
    room: PlanRoom | None = None,
) -> AttentionPlan:
    """page_tables, query_lengths, context_lengths, window as in `paged_attention_reference`; sequences may come in any
    order. rows: of page_tables [., P], for each sequence; None where they are in that order. What the plan holds is on
    `device`; page_tables, in main memory, may not be changed while it is used. room: where on a GPU it lies, None for
    memory of its own.
    """
    if triton_gpu.applies_on(device):
        return plan_on_device(
            page_tables,
            query_lengths,
            context_lengths,
            page_size=page_size,
            window=window,
            device=device,
            rows=rows,
            room=room,
        )
    if not native_cpu.applies_on(device):
        if rows is not None:
            page_tables = page_tables[list(rows), : -(-max(context_lengths) // page_size)]
        return plan_gathers(
            page_tables, query_lengths, context_lengths, page_size=page_size, window=window, device=device
        )
    rows = range(len(query_lengths)) if rows is None else rows
    if page_tables.stride(1) != 1:
        page_tables = page_tables.contiguous()
    steps = native_cpu.LIBRARY.AttentionSteps(
        page_tables.data_ptr(), page_tables.stride(0), rows, query_lengths, context_lengths, window or 0
    )
    return PagePlan(steps, page_tables, rows, query_lengths, context_lengths, page_size, window)


def paged_attention(
    query_TND: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: AttentionPlan,
    heads: HeadGroups,
    *,
    scale: float,
    logit_softcap: float | None = None,
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """`paged_attention_reference` of the sequences of `plan`, to rounding.

    query_TND and the caches share a dtype, or these are in 8 bits with kv_scales; all may be strided. What a cache
    holds where no sequence has written, NaN included, does not reach the output. Returns [T, N, D].
    """
    check_scales(key_cache, kv_scales)
    if isinstance(plan, DevicePlan):
        return triton_gpu.find_triton().operators.paged_attention(  # type: ignore[no-any-return]
            query_TND,
            key_cache,
            value_cache,
            plan,
            heads,
            scale=scale,
            logit_softcap=logit_softcap,
            kv_scales=kv_scales,
        )
    if isinstance(plan, PagePlan):
        code = native_cpu.code_of(query_TND)
        page_stride, slot_stride, head_stride, step = key_cache.stride()
        alike = value_cache.stride() == key_cache.stride()
        scales = native_scales(key_cache, kv_scales)
        if code is not None and heads.native is not None and alike and step == 1 and scales is not None:
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
                scales.keys,
                scales.values,
                query_TND.stride(0),
                num_heads * head_dim,
                key_cache.shape[1],
                page_stride,
                slot_stride,
                head_stride,
                scales.stride,
                head_dim,
                scale,
                logit_softcap or 0.0,
                code,
                scales.pages,
            )
            return out_TND
        plan = plan.gathers
    return gathered_attention(
        query_TND, key_cache, value_cache, plan, heads, scale=scale, logit_softcap=logit_softcap, kv_scales=kv_scales
    )
