"""Steps of attention, and what they should give, written out from the formula in float64.

Shapes: T new tokens of a sequence, L tokens of it, N query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from phalanx.kernels import AttentionPlan, KVScales, group_heads, paged_attention, plan_attention, write_kv

CPU = torch.device("cpu")
HEAD_DIM = 8
SCALE = 0.3


class Step(NamedTuple):
    """Arguments of the operators, and what they should return, in float64. kv_scales: of caches in 8 bits."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    page_tables: torch.Tensor
    query_lengths: list[int]
    context_lengths: list[int]
    kv_of_query: tuple[int, ...]
    window: int | None
    logit_softcap: float | None
    expected: torch.Tensor
    kv_scales: KVScales | None = None


def formula(
    q_TND: torch.Tensor,
    k_LKD: torch.Tensor,
    v_LKD: torch.Tensor,
    kv_of_query: tuple[int, ...],
    window: int | None,
    logit_softcap: float | None,
) -> torch.Tensor:
    """softmax(scale q k) v over the positions seen, in float64 [T, N, D]."""
    heads = list(kv_of_query)
    position = torch.arange(len(k_LKD))
    age_TL = position[-len(q_TND) :, None] - position
    unseen_TL = (age_TL < 0) | (age_TL >= (window or len(k_LKD)))
    scores_NTL = torch.einsum("tnd,lnd->ntl", q_TND.double() * SCALE, k_LKD[:, heads].double())
    if logit_softcap is not None:
        scores_NTL = (scores_NTL / logit_softcap).tanh() * logit_softcap
    weights_NTL = scores_NTL.masked_fill(unseen_TL, float("-inf")).softmax(-1)
    return torch.einsum("ntl,lnd->tnd", weights_NTL, v_LKD[:, heads].double())


def read_back(cache: torch.Tensor, scales: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What a cache in 8 bits holds at these slots, in float64 [L, K, D]."""
    page, offset = slots // cache.shape[1], slots % cache.shape[1]
    return cache.double()[page, offset] * scales.double()[page, :, offset].unsqueeze(-1)


def make_step(
    lengths: list[tuple[int, int]],
    *,
    page_size: int = 4,
    window: int | None = None,
    kv_of_query: tuple[int, ...] = (0, 0, 0, 1, 1),
    dtype: torch.dtype = torch.float32,
    poison: float = float("nan"),
    head_dim: int = HEAD_DIM,
    logit_softcap: float | None = None,
    cache_dtype: torch.dtype | None = None,
) -> Step:
    """lengths: tokens in the cache and new ones, of each sequence. Pages are scattered; slots that no token has filled
    hold `poison`, and the ends of page tables that no page fills are no page at all. cache_dtype: of 8 bits, whose
    numbers times their scales are what is expected to be attended to; None for dtype.
    """
    num_kv = max(kv_of_query) + 1
    pages_of = [-(-(past + new) // page_size) for past, new in lengths]
    free = torch.randperm(sum(pages_of) + 3)
    page_tables = torch.full((len(lengths), max(pages_of) + 2), -(10**9))
    key_cache = torch.full((len(free), page_size, num_kv, head_dim), poison).to(cache_dtype or dtype)
    value_cache = key_cache.clone()
    kv_scales = None
    if cache_dtype is not None:
        key_scales = torch.full((len(free), num_kv, page_size), poison, dtype=torch.bfloat16)
        kv_scales = key_scales, key_scales.clone()
    queries, expected = [], []
    for table, end, num_pages, (past, new) in zip(
        page_tables, itertools.accumulate(pages_of), pages_of, lengths, strict=True
    ):
        table[:num_pages] = free[end - num_pages : end]
        position = torch.arange(past + new)
        k_LKD, v_LKD = torch.randn(2, past + new, num_kv, head_dim).to(dtype)
        slots = table[position // page_size] * page_size + position % page_size
        write_kv(k_LKD, v_LKD, key_cache, value_cache, slots, kv_scales)
        if kv_scales is not None:
            k_LKD, v_LKD = (read_back(*each, slots) for each in zip((key_cache, value_cache), kv_scales, strict=True))
        queries.append(torch.randn(new, len(kv_of_query), head_dim).to(dtype))
        expected.append(formula(queries[-1], k_LKD, v_LKD, kv_of_query, window, logit_softcap))
    return Step(
        torch.cat(queries),
        key_cache,
        value_cache,
        page_tables,
        [new for _, new in lengths],
        [past + new for past, new in lengths],
        kv_of_query,
        window,
        logit_softcap,
        torch.cat(expected),
        kv_scales,
    )


def plan_of(step: Step) -> AttentionPlan:
    return plan_attention(
        step.page_tables,
        step.query_lengths,
        step.context_lengths,
        page_size=step.key_cache.shape[1],
        window=step.window,
        device=step.query.device,
    )


def by_plan(step: Step, plan: AttentionPlan | None = None) -> torch.Tensor:
    heads = group_heads(step.kv_of_query, step.key_cache.shape[2], step.query.device)
    return paged_attention(
        step.query,
        step.key_cache,
        step.value_cache,
        plan or plan_of(step),
        heads,
        scale=SCALE,
        logit_softcap=step.logit_softcap,
        kv_scales=step.kv_scales,
    )
