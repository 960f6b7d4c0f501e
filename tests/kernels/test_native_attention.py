"""Native attention in every set of instructions that this processor has: how exact it is, and that what a token gets
depends on nothing but its sequence.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.attention_steps import SCALE, Step, by_plan, make_step
from tests.kernels.instruction_sets import every_set, needs_native, only, threads

from phalanx.kernels import KV_DTYPES

pytestmark = needs_native

GROUPS = [(0,), (0, 0, 0), (0, 1), (0, 0, 0, 1, 1), (0, 1, 1, 1, 2), (1, 0, 0), tuple([0] * 75)]
HEAD_DIMS = [1, 7, 16, 24, 40, 64, 80, 96, 128, 256]


def largest(step: Step, number: int) -> float:
    """Magnitude of what is written of keys (0) or values (1)."""
    cache = (step.key_cache, step.value_cache)[number].double()
    if step.kv_scales is not None:
        cache = cache * step.kv_scales[number].double().transpose(1, 2).unsqueeze(-1)
    return float(cache[cache.isfinite()].abs().max())


def assert_within_bounds(actual: torch.Tensor, step: Step) -> None:
    """What rounding may do, with u the unit of float32: scores are sums of D products, whose error is that of their
    weights, twice (once in the sum that divides); weights and values are sums over at most L keys. In bfloat16 weights
    may be rounded once, and the sum that divides is theirs; the result is rounded in every narrow type. Scales of 8-bit
    caches are multiplied by in float32, once a score and once a weight.
    """
    unit = 2.0**-24
    largest_key, largest_value = (largest(step, number) for number in (0, 1))
    head_dim, length = step.query.shape[2], max(step.context_lengths)
    products = head_dim * float(step.query.double().abs().max()) * largest_key * SCALE
    capped = 8 * unit * (step.logit_softcap or 0.0)
    score_error = (head_dim + 3) * unit * products + capped
    weight_error = 2 * score_error + (length + 17) * unit
    if step.query.dtype == torch.bfloat16:
        weight_error += 2.0**-8
    rounding = 0.0 if step.query.dtype == torch.float32 else torch.finfo(step.query.dtype).eps / 2
    bound = weight_error * largest_value + rounding * step.expected.abs() + torch.finfo(step.query.dtype).tiny
    error = (actual.double() - step.expected).abs()
    assert (error <= bound).all(), f"{float((error / bound).max()):.2f} times the bound"


decodes = st.tuples(st.integers(0, 600), st.just(1))
chunks = st.tuples(st.integers(0, 300), st.integers(1, 90))


@every_set
@settings(max_examples=40)
@given(
    lengths=st.lists(decodes | chunks, min_size=1, max_size=5),
    page_size=st.sampled_from([1, 5, 16, 64, 100]),
    window=st.sampled_from([None, None, 1, 40, 64, 300]),
    kv_of_query=st.sampled_from(GROUPS),
    head_dim=st.sampled_from(HEAD_DIMS),
    logit_softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    cache_dtype=st.sampled_from([None, *KV_DTYPES.values()]),
    num_threads=st.sampled_from([1, 3]),
    poison=st.sampled_from([float("nan"), float("inf")]),
)
def test_ragged_steps_within_derived_bounds(
    chosen: int,
    lengths: list[tuple[int, int]],
    page_size: int,
    window: int | None,
    kv_of_query: tuple[int, ...],
    head_dim: int,
    logit_softcap: float | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    num_threads: int,
    poison: float,
) -> None:
    step = make_step(
        lengths,
        page_size=page_size,
        window=window,
        kv_of_query=kv_of_query,
        head_dim=head_dim,
        logit_softcap=logit_softcap,
        dtype=dtype,
        cache_dtype=cache_dtype,
        poison=poison,
    )
    with only(chosen), threads(num_threads):
        assert_within_bounds(by_plan(step), step)


def cut(step: Step, sizes: list[int]) -> list[Step]:
    """The one sequence of `step`, its new tokens in steps of these sizes."""
    [new], [length] = step.query_lengths, step.context_lengths
    assert sum(sizes) == new
    found: list[Step] = []
    seen = length - new
    for size, query in zip(sizes, torch.split(step.query, sizes), strict=True):
        seen += size
        found.append(step._replace(query=query, query_lengths=[size], context_lengths=[seen]))
    return found


@every_set
@settings(max_examples=25)
@given(
    past=st.integers(0, 400),
    sizes=st.lists(st.sampled_from([1, 2, 17, 64, 130]), min_size=2, max_size=6),
    window=st.sampled_from([None, 1, 50, 300]),
    kv_of_query=st.sampled_from([(0, 0, 0, 1, 1), (0, 0, 0)]),
    head_dim=st.sampled_from([16, 40, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    cache_dtype=st.sampled_from([None, *KV_DTYPES.values()]),
)
def test_the_same_bits_however_a_prompt_is_cut(
    chosen: int,
    past: int,
    sizes: list[int],
    window: int | None,
    kv_of_query: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
) -> None:
    step = make_step(
        [(past, sum(sizes))],
        window=window,
        kv_of_query=kv_of_query,
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        page_size=16,
    )
    with only(chosen):
        whole = by_plan(step)
        parts = torch.cat([by_plan(part) for part in cut(step, sizes)])
    assert torch.equal(whole, parts)


@every_set
@settings(max_examples=25)
@given(
    lengths=st.lists(decodes | chunks, min_size=2, max_size=12),
    window=st.sampled_from([None, 50]),
    head_dim=st.sampled_from([40, 64]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    cache_dtype=st.sampled_from([None, *KV_DTYPES.values()]),
)
def test_the_same_bits_in_any_batch_and_on_any_number_of_threads(
    chosen: int,
    lengths: list[tuple[int, int]],
    window: int | None,
    head_dim: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
) -> None:
    step = make_step(
        lengths,
        window=window,
        kv_of_query=(0, 0, 0, 1, 1),
        head_dim=head_dim,
        dtype=dtype,
        cache_dtype=cache_dtype,
        page_size=16,
    )
    rows = torch.split(step.query, step.query_lengths)
    with only(chosen), threads(1):
        alone = [
            by_plan(
                step._replace(
                    query=query,
                    page_tables=step.page_tables[place : place + 1],
                    query_lengths=[step.query_lengths[place]],
                    context_lengths=[step.context_lengths[place]],
                )
            )
            for place, query in enumerate(rows)
        ]
        assert torch.equal(by_plan(step), torch.cat(alone))
    with only(chosen), threads(3):
        assert torch.equal(by_plan(step), torch.cat(alone))


@every_set
def test_the_same_bits_where_few_sequences_are_cut_along_their_keys(chosen: int) -> None:
    """Two sequences for three threads: each split of their keys is computed apart, and joined behind."""
    step = make_step([(3000, 1), (700, 40)], page_size=16, head_dim=64, dtype=torch.bfloat16)
    with only(chosen), threads(1):
        by_one = by_plan(step)
        assert_within_bounds(by_one, step)
    with only(chosen), threads(3):
        assert torch.equal(by_plan(step), by_one)
