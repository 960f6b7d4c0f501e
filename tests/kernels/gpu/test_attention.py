"""Attention in Triton against a float64 computation written out from the formula."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.attention_steps import SCALE, Step, by_plan, make_step, plan_of

from phalanx.kernels import KV_DTYPES, DevicePlan, PlanRoom, group_heads, paged_attention, token_places
from phalanx.kernels.device_plan import plan_on_device
from phalanx.kernels.gpu.target import A100, H100, Target, assumed
from phalanx.kernels.triton_gpu import find_triton

gpu = find_triton().operators

# Of the norm of the error to that of the result, beside what rounding the right result takes (1.6e-3 for bfloat16).
ERROR = {torch.float32: 1e-5, torch.float16: 3e-4, torch.bfloat16: 2e-3}
EACH = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

GROUPS = [(0,), (0, 0, 0), (0, 0, 1, 1), (0, 0, 0, 1, 1), (0, 1, 1, 1, 2), (1, 0, 0), (0, 0, 2)]
HEAD_DIMS = [64, 80, 96, 128, 256]


def on(step: Step, device: torch.device) -> Step:
    """The page tables stay in main memory."""
    scales = None if step.kv_scales is None else (step.kv_scales[0].to(device), step.kv_scales[1].to(device))
    return step._replace(
        query=step.query.to(device),
        key_cache=step.key_cache.to(device),
        value_cache=step.value_cache.to(device),
        kv_scales=scales,
    )


def assert_right(actual: torch.Tensor, expected: torch.Tensor) -> None:
    actual, dtype = actual.double().cpu(), actual.dtype
    rounding = (expected.to(dtype).double() - expected).norm()
    assert (actual - expected).norm() <= torch.hypot(rounding, ERROR[dtype] * expected.norm())
    torch.testing.assert_close(actual, expected, rtol=EACH[dtype], atol=EACH[dtype])


def attend(step: Step, target: Target, device: torch.device) -> torch.Tensor:
    """Outputs and what lies between are NaN before they are written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with assumed(target):
            return by_plan(on(step, device))
    finally:
        torch.use_deterministic_algorithms(before)


decodes = st.tuples(st.integers(0, 150), st.just(1))
chunks = st.tuples(st.one_of(st.just(0), st.integers(0, 100)), st.integers(1, 70))


@settings(max_examples=25)
@given(
    lengths=st.lists(decodes | chunks, min_size=1, max_size=4),
    page_size=st.sampled_from([5, 16, 64, 128]),
    head_dim=st.sampled_from(HEAD_DIMS),
    kv_of_query=st.sampled_from(GROUPS),
    window=st.sampled_from([None, 1, 7, 90]),
    logit_softcap=st.sampled_from([None, None, 0.5]),
    dtype=st.sampled_from(list(ERROR)),
    cache_dtype=st.sampled_from([None, None, *KV_DTYPES.values()]),
    poison=st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    target=st.sampled_from([A100, H100]),
)
def test_ragged_sequences(
    lengths: list[tuple[int, int]],
    page_size: int,
    head_dim: int,
    kv_of_query: tuple[int, ...],
    window: int | None,
    logit_softcap: float | None,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None,
    poison: float,
    target: Target,
    device: torch.device,
) -> None:
    """Decodes and chunks in any order; of the cache nothing is read that was not written."""
    step = make_step(
        lengths,
        page_size=page_size,
        head_dim=head_dim,
        kv_of_query=kv_of_query,
        window=window,
        logit_softcap=logit_softcap,
        dtype=dtype,
        cache_dtype=cache_dtype,
        poison=poison,
    )
    assert_right(attend(step, target, device), step.expected)


@pytest.mark.parametrize("kv_of_query", [(0, 0, 0, 1, 1), (0, 0)])
@pytest.mark.parametrize("window", [None, 700])
def test_a_long_sequence_is_divided_and_counters_are_set_back(
    kv_of_query: tuple[int, ...], window: int | None, device: torch.device
) -> None:
    """Beside short ones, which are not, and one of a single token; twice with one plan."""
    step = make_step(
        [(900, 1), (0, 1), (300, 1), (63, 1)], page_size=16, head_dim=64, kv_of_query=kv_of_query, window=window,
        dtype=torch.bfloat16,
    )  # fmt: skip
    there = on(step, device)
    plan = plan_of(there)
    assert isinstance(plan, DevicePlan) and plan.longest is not None
    assert plan.longest == min(901, window or 901)
    for _ in range(2):
        assert_right(by_plan(there, plan), step.expected)
        assert not plan.room.counters(max(kv_of_query) + 1).any()


def test_caches_that_are_views_of_one_layer(device: torch.device) -> None:
    """Keys beside values in one tensor, all layers of a page together; pages by pointer and by descriptor."""
    for page_size in (16, 64):
        step = make_step([(5, 1), (100, 1), (0, 6), (60, 30)], page_size=page_size, head_dim=64, dtype=torch.bfloat16)
        num_pages, *inner = step.key_cache.shape
        pool = torch.full((num_pages, 3, 2, *inner), float("nan"), dtype=torch.bfloat16)
        pool[:, 1, 0], pool[:, 1, 1] = step.key_cache, step.value_cache
        pool = pool.to(device)
        strided = on(step, device)._replace(key_cache=pool[:, 1, 0], value_cache=pool[:, 1, 1])
        assert_right(by_plan(strided), step.expected)


def test_queries_that_are_part_of_a_wider_product(device: torch.device) -> None:
    step = on(make_step([(20, 1), (3, 9)], head_dim=64, page_size=16), device)
    wide = torch.full((10, 9, 64), float("nan"), device=device)
    wide[:, :5] = step.query
    assert_right(by_plan(step._replace(query=wide[:, :5])), step.expected)


def test_a_token_that_sees_nothing_gives_zeros_and_a_place_without_one_nothing(device: torch.device) -> None:
    """Rows of `sequences` with one token of a length of 0, and with no token."""
    step = on(make_step([(20, 1)], head_dim=64), device)
    numbers = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.int32, device=device)
    out = torch.full((2, 5, 64), float("nan"), device=device)
    query = torch.randn_like(out)
    common = {"group": 3, "scale": SCALE, "window": 0, "logit_softcap": 0.0}
    table = group_heads(step.kv_of_query, 2, device).table
    pages, counters = numbers.new_zeros(8), numbers.new_zeros(8)
    caches = (step.key_cache, step.value_cache)
    gpu.decode_attention(out, query, *caches, numbers, pages, counters, table, None, None, **common, longest=0)
    assert out[0].isnan().all()
    assert (out[1] == 0).all()


def test_queries_of_another_dtype_are_refused(device: torch.device) -> None:
    step = on(make_step([(20, 1)], head_dim=64, dtype=torch.float64), device)
    with pytest.raises(TypeError, match=r"bfloat16, float16 or float32, not torch\.float64"):
        by_plan(step)


@pytest.mark.parametrize("lengths", [[(300, 1)], [(3, 5)]], ids=["decode", "prefill"])
def test_the_operators_are_registered(lengths: list[tuple[int, int]], device: torch.device) -> None:
    step = on(make_step(lengths, head_dim=64, page_size=16, poison=0.0), device)
    plan = plan_of(step)
    assert isinstance(plan, DevicePlan)
    out, table = torch.zeros_like(step.query), group_heads(step.kv_of_query, 2, device).table
    arguments: list[Any] = [out, step.query, step.key_cache, step.value_cache, plan.sequences, plan.pages]
    common = {"group": 3, "scale": SCALE, "window": 0, "logit_softcap": 0.0}
    if plan.num_decodes:
        arguments += [plan.room.counters(2), table, None, None]
        op, size = torch.ops.phalanx.decode_attention.default, {"longest": 301}
    else:
        arguments += [table, None, None]
        op, size = torch.ops.phalanx.prefill_attention.default, {"most_new": 5}
    torch.library.opcheck(op, tuple(arguments), {**common, **size})


def test_a_plan_in_a_room_is_where_the_one_before_was(device: torch.device) -> None:
    """What was launched for one step attends right in the next: as a CUDA graph would, where there is a GPU in one."""
    room = PlanRoom(max_sequences=4, max_pages=64, device=device)
    steps = [make_step(lengths, head_dim=64, page_size=16) for lengths in ([(40, 1)], [(300, 1), (0, 1), (90, 1)])]
    num_pages = max(len(step.key_cache) for step in steps)
    caches = torch.full((2, num_pages, *steps[0].key_cache.shape[1:]), float("nan"), device=device)
    query = torch.zeros(4, *steps[0].query.shape[1:], device=device)
    heads = group_heads(steps[0].kv_of_query, 2, device)

    def attend_by(plan: DevicePlan) -> torch.Tensor:
        return paged_attention(query, caches[0], caches[1], plan, heads, scale=SCALE)

    replay = None
    for step in steps:
        caches[0, : len(step.key_cache)] = step.key_cache.to(device)
        caches[1, : len(step.key_cache)] = step.value_cache.to(device)
        query[: len(step.query)] = step.query.to(device)
        plan = plan_on_device(
            step.page_tables, step.query_lengths, step.context_lengths, page_size=16, window=None, device=device,
            room=room, num_places=4,
        )  # fmt: skip
        if replay is None:
            replay = _capture(partial(attend_by, plan), device)
        assert_right(replay()[: len(step.query)], step.expected)


def _capture(function: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], torch.Tensor]:
    """The function's launches and nothing else of it, to be made again."""
    if device.type == "cuda":
        function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = function()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay
    return function


def test_a_step_that_does_not_fit_into_its_room_is_refused(device: torch.device) -> None:
    step = make_step([(40, 1), (3, 1)], page_size=4)
    with pytest.raises(ValueError, match=r"2 sequences and 12 pages does not fit into the room for 2 and 11"):
        plan_on_device(
            step.page_tables, step.query_lengths, step.context_lengths, page_size=4, window=None, device=device,
            room=PlanRoom(2, 11, device),
        )  # fmt: skip


@settings(max_examples=10)
@given(
    lengths=st.lists(decodes | chunks, min_size=1, max_size=5),
    page_size=st.sampled_from([5, 16]),
    window=st.sampled_from([None, 7]),
)
def test_places_of_tokens(
    lengths: list[tuple[int, int]], page_size: int, window: int | None, device: torch.device
) -> None:
    step = make_step(lengths, page_size=page_size, window=window)
    plan = plan_of(on(step, device))
    rows, numbers = range(len(lengths)), (step.query_lengths, step.context_lengths)
    given_plan = token_places(step.page_tables, rows, *numbers, page_size=page_size, device=device, plan=plan)
    without = token_places(step.page_tables, rows, *numbers, page_size=page_size, device=torch.device("cpu"))
    for found, expected in zip(given_plan, without, strict=True):
        assert torch.equal(found.cpu(), expected)


def test_places_are_registered(device: torch.device) -> None:
    sequences = torch.tensor([[0, 2, 9, 0], [2, 1, 3, 3]], dtype=torch.int32, device=device)
    pages = torch.tensor([7, 5, 6, 2], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.phalanx.token_places.default, (sequences, pages, 3, 2, 4))
