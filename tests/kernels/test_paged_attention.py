"""`paged_attention` and its reference against a float64 computation written out from the formula.

Shapes: T new tokens of a sequence, L tokens of it, N query heads, K KV heads, D head dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.kernels import (
    AttentionPlan,
    group_heads,
    paged_attention,
    paged_attention_reference,
    plan_attention,
    write_kv,
)

CPU = torch.device("cpu")
HEAD_DIM = 8
SCALE = 0.3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Step(NamedTuple):
    """Arguments of the operators, and what they should return, in float64."""

    query: torch.Tensor
    key_cache: torch.Tensor
    value_cache: torch.Tensor
    page_tables: torch.Tensor
    query_lengths: list[int]
    context_lengths: list[int]
    kv_of_query: tuple[int, ...]
    window: int | None
    expected: torch.Tensor


def by_reference(step: Step) -> torch.Tensor:
    return paged_attention_reference(
        step.query,
        step.key_cache,
        step.value_cache,
        step.page_tables,
        step.query_lengths,
        step.context_lengths,
        torch.tensor(step.kv_of_query),
        scale=SCALE,
        window=step.window,
    )


def plan_of(step: Step) -> AttentionPlan:
    return plan_attention(
        step.page_tables,
        step.query_lengths,
        step.context_lengths,
        page_size=step.key_cache.shape[1],
        window=step.window,
        device=CPU,
    )


def by_plan(step: Step) -> torch.Tensor:
    heads = group_heads(step.kv_of_query, step.key_cache.shape[2], CPU)
    return paged_attention(step.query, step.key_cache, step.value_cache, plan_of(step), heads, scale=SCALE)


both = pytest.mark.parametrize("attend", [by_reference, by_plan])


def formula(
    q_TND: torch.Tensor, k_LKD: torch.Tensor, v_LKD: torch.Tensor, kv_of_query: tuple[int, ...], window: int | None
) -> torch.Tensor:
    """softmax(scale q k) v over the positions seen, in float64 [T, N, D]."""
    heads = list(kv_of_query)
    position = torch.arange(len(k_LKD))
    age_TL = position[-len(q_TND) :, None] - position
    unseen_TL = (age_TL < 0) | (age_TL >= (window or len(k_LKD)))
    scores_NTL = torch.einsum("tnd,lnd->ntl", q_TND.double() * SCALE, k_LKD[:, heads].double())
    weights_NTL = scores_NTL.masked_fill(unseen_TL, float("-inf")).softmax(-1)
    return torch.einsum("ntl,lnd->tnd", weights_NTL, v_LKD[:, heads].double())


def make_step(
    lengths: list[tuple[int, int]],
    *,
    page_size: int = 4,
    window: int | None = None,
    kv_of_query: tuple[int, ...] = (0, 0, 0, 1, 1),
    dtype: torch.dtype = torch.float32,
    poison: float = float("nan"),
) -> Step:
    """lengths: tokens in the cache and new ones, of each sequence. Pages are scattered; slots that no token has filled
    hold `poison`, and the ends of page tables that no page fills are no page at all.
    """
    num_kv = max(kv_of_query) + 1
    pages_of = [-(-(past + new) // page_size) for past, new in lengths]
    free = torch.randperm(sum(pages_of) + 3)
    page_tables = torch.full((len(lengths), max(pages_of) + 2), -(10**9))
    key_cache = torch.full((len(free), page_size, num_kv, HEAD_DIM), poison, dtype=dtype)
    value_cache = key_cache.clone()
    queries, expected = [], []
    for table, end, num_pages, (past, new) in zip(
        page_tables, itertools.accumulate(pages_of), pages_of, lengths, strict=True
    ):
        table[:num_pages] = free[end - num_pages : end]
        position = torch.arange(past + new)
        k_LKD, v_LKD = torch.randn(2, past + new, num_kv, HEAD_DIM).to(dtype)
        slots = table[position // page_size] * page_size + position % page_size
        write_kv(k_LKD, v_LKD, key_cache, value_cache, slots)
        queries.append(torch.randn(new, len(kv_of_query), HEAD_DIM).to(dtype))
        expected.append(formula(queries[-1], k_LKD, v_LKD, kv_of_query, window))
    return Step(
        torch.cat(queries),
        key_cache,
        value_cache,
        page_tables,
        [new for _, new in lengths],
        [past + new for past, new in lengths],
        kv_of_query,
        window,
        torch.cat(expected),
    )


def assert_right(actual: torch.Tensor, step: Step) -> None:
    tolerance = TOLERANCE[step.query.dtype]
    assert actual.dtype == step.query.dtype
    torch.testing.assert_close(actual.double(), step.expected, rtol=tolerance, atol=tolerance)


decodes = st.tuples(st.integers(0, 60), st.just(1))
chunks = st.tuples(st.one_of(st.just(0), st.integers(0, 40)), st.integers(1, 20))


@both
@settings(max_examples=60)
@given(
    lengths=st.lists(decodes | chunks, min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 7, 40]),
    kv_of_query=st.sampled_from([(0,), (0, 0, 0), (0, 1), (0, 0, 1, 1), (0, 0, 0, 1, 1), (0, 1, 1, 1, 2), (1, 0, 0)]),
    dtype=st.sampled_from(list(TOLERANCE)),
    poison=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_ragged_sequences(
    attend: Callable[[Step], torch.Tensor],
    lengths: list[tuple[int, int]],
    page_size: int,
    window: int | None,
    kv_of_query: tuple[int, ...],
    dtype: torch.dtype,
    poison: float,
) -> None:
    """Decodes and chunks in any order; of the cache nothing is read that was not written."""
    step = make_step(lengths, page_size=page_size, window=window, kv_of_query=kv_of_query, dtype=dtype, poison=poison)
    assert_right(attend(step), step)


@both
@pytest.mark.parametrize("window", [None, 100, 1000])
def test_more_tokens_than_a_block_of_any_kind(attend: Callable[[Step], torch.Tensor], window: int | None) -> None:
    """Decodes of unequal lengths for several blocks, one of them longer than a block, and a chunk whose window begins
    where its context does not.
    """
    lengths = [(past, 1) for past in torch.randint(0, 300, (40,)).tolist()]
    step = make_step([*lengths, (3000, 1), (900, 600)], page_size=16, window=window, kv_of_query=(0, 0, 1))
    assert_right(attend(step), step)


@both
@pytest.mark.parametrize("lengths", [[(5, 1)], [(5, 1), (11, 1), (0, 6), (7, 3)]], ids=["one", "several"])
def test_caches_that_are_views_of_one_layer(
    attend: Callable[[Step], torch.Tensor], lengths: list[tuple[int, int]]
) -> None:
    """Keys beside values in one tensor, all layers of a page together."""
    step = make_step(lengths)
    num_pages, *inner = step.key_cache.shape
    pool = torch.full((num_pages, 3, 2, *inner), float("nan"))
    pool[:, 1, 0], pool[:, 1, 1] = step.key_cache, step.value_cache
    strided = step._replace(key_cache=pool[:, 1, 0], value_cache=pool[:, 1, 1])
    assert_right(attend(strided), step)


def test_one_plan_serves_every_layer() -> None:
    """A second layer, whose values are twice the first's, and the first once more."""
    step = make_step([(5, 1), (11, 1), (0, 6), (7, 3)])
    plan = plan_of(step)
    heads = group_heads(step.kv_of_query, step.key_cache.shape[2], CPU)
    for factor in (1, 2, 1):
        output = paged_attention(step.query, step.key_cache, factor * step.value_cache, plan, heads, scale=SCALE)
        assert_right(output, step._replace(expected=factor * step.expected))


@both
def test_the_cache_is_left_as_it_was(attend: Callable[[Step], torch.Tensor]) -> None:
    step = make_step([(5, 1), (11, 1), (0, 6), (7, 3)])
    before = step.key_cache.clone(), step.value_cache.clone()
    attend(step)
    for cache, copy in zip((step.key_cache, step.value_cache), before, strict=True):
        torch.testing.assert_close(cache, copy, rtol=0, atol=0, equal_nan=True)


def test_a_kv_head_that_no_query_head_uses() -> None:
    step = make_step([(5, 1), (11, 1), (7, 3)], kv_of_query=(0, 0, 2))
    assert_right(by_plan(step), step)
