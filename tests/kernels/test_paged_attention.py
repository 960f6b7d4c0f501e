"""`paged_attention` and its reference against a float64 computation written out from the formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.attention_steps import CPU, SCALE, Step, by_plan, make_step, plan_of

from phalanx.kernels import KV_DTYPES, group_heads, native_cpu, paged_attention, paged_attention_reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


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
        logit_softcap=step.logit_softcap,
        kv_scales=step.kv_scales,
    )


def by_gathers(step: Step) -> torch.Tensor:
    """As where there is no native library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cpu, "LIBRARY", None)
        return by_plan(step)


every_way = pytest.mark.parametrize("attend", [by_reference, by_plan, by_gathers])


def assert_right(actual: torch.Tensor, step: Step) -> None:
    tolerance = TOLERANCE[step.query.dtype]
    assert actual.dtype == step.query.dtype
    torch.testing.assert_close(actual.double(), step.expected, rtol=tolerance, atol=tolerance)


decodes = st.tuples(st.integers(0, 60), st.just(1))
chunks = st.tuples(st.one_of(st.just(0), st.integers(0, 40)), st.integers(1, 20))


@every_way
@settings(max_examples=60)
@given(
    lengths=st.lists(decodes | chunks, min_size=1, max_size=6),
    page_size=st.sampled_from([1, 4, 16]),
    window=st.sampled_from([None, 1, 7, 40]),
    kv_of_query=st.sampled_from([(0,), (0, 0, 0), (0, 1), (0, 0, 1, 1), (0, 0, 0, 1, 1), (0, 1, 1, 1, 2), (1, 0, 0)]),
    logit_softcap=st.sampled_from([None, None, 0.5]),
    dtype=st.sampled_from(list(TOLERANCE)),
    cache_dtype=st.sampled_from([None, None, *KV_DTYPES.values()]),
    poison=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
def test_ragged_sequences(
    attend: Callable[[Step], torch.Tensor],
    lengths: list[tuple[int, int]],
    page_size: int,
    window: int | None,
    kv_of_query: tuple[int, ...],
    logit_softcap: float | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    poison: float,
) -> None:
    """Decodes and chunks in any order; of the cache nothing is read that was not written."""
    step = make_step(
        lengths,
        page_size=page_size,
        window=window,
        kv_of_query=kv_of_query,
        logit_softcap=logit_softcap,
        dtype=dtype,
        cache_dtype=cache_dtype,
        poison=poison,
    )
    assert_right(attend(step), step)


@every_way
@pytest.mark.parametrize("window", [None, 100, 1000])
def test_more_tokens_than_a_block_of_any_kind(attend: Callable[[Step], torch.Tensor], window: int | None) -> None:
    """Decodes of unequal lengths for several blocks, one of them longer than a block, and a chunk whose window begins
    where its context does not.
    """
    lengths = [(past, 1) for past in torch.randint(0, 300, (40,)).tolist()]
    step = make_step([*lengths, (3000, 1), (900, 600)], page_size=16, window=window, kv_of_query=(0, 0, 1))
    assert_right(attend(step), step)


@every_way
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


@every_way
def test_the_cache_is_left_as_it_was(attend: Callable[[Step], torch.Tensor]) -> None:
    step = make_step([(5, 1), (11, 1), (0, 6), (7, 3)])
    before = step.key_cache.clone(), step.value_cache.clone()
    attend(step)
    for cache, copy in zip((step.key_cache, step.value_cache), before, strict=True):
        torch.testing.assert_close(cache, copy, rtol=0, atol=0, equal_nan=True)


def test_a_kv_head_that_no_query_head_uses() -> None:
    step = make_step([(5, 1), (11, 1), (7, 3)], kv_of_query=(0, 0, 2))
    assert_right(by_plan(step), step)
