"""`rope_and_attend` in Triton, for steps of decodes in one launch, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.attention_steps import SCALE, Step, formula, make_step, plan_of
from tests.kernels.gpu.test_attention import EACH, GROUPS, on

from phalanx.kernels import (
    KV_DTYPES,
    DevicePlan,
    KVScales,
    group_heads,
    rope_and_attend,
    token_places,
    write_kv,
)
from phalanx.kernels.gpu.target import A100, H100, Target, assumed
from phalanx.kernels.triton_gpu import find_triton

gpu = find_triton().operators
EPS = 1e-5


def rotated(x_THD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
    """In float64, rounded to the dtype of `x_THD` where the operators round too."""
    x = x_THD.double()
    if norm is not None:
        x = (norm.double() * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()).to(x_THD.dtype).double()
    low, high = x.chunk(2, -1)
    return (x * cos.double() + torch.cat((-high, low), -1) * sin.double()).to(x_THD.dtype).double()


def slots_of(step: Step) -> torch.Tensor:
    """Of the new token of each sequence."""
    page_size = step.key_cache.shape[1]
    position = torch.tensor(step.context_lengths) - 1
    return step.page_tables[torch.arange(len(position)), position // page_size] * page_size + position % page_size


def tokens_of(cache: torch.Tensor, step: Step, sequence: int) -> torch.Tensor:
    pages = step.page_tables[sequence, : -(-step.context_lengths[sequence] // cache.shape[1])]
    return cache[pages].flatten(0, 1)[: step.context_lengths[sequence]].double()


def assert_the_same_pages(
    found: tuple[torch.Tensor, ...], found_scales: KVScales | None, right: list[torch.Tensor], scales: KVScales | None
) -> None:
    """But for the last bits of a rotation, which make a number, or a scale, the next one."""
    for cache, wanted in zip(found, right, strict=True):
        ulp = 1 / 127 if wanted.dtype == torch.int8 else torch.finfo(wanted.dtype).eps
        atol = 1.0 if wanted.dtype == torch.int8 else max(ulp / 8, 1e-6)
        torch.testing.assert_close(cache.cpu().float(), wanted.float(), rtol=ulp, atol=atol, equal_nan=True)
    for each, wanted in zip(found_scales or (), scales or (), strict=True):
        torch.testing.assert_close(each.cpu(), wanted, rtol=2.0**-7, atol=0.0, equal_nan=True)


def check(
    past: list[int],
    device: torch.device,
    target: Target = H100,
    *,
    norms: bool = False,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    kv_of_query: tuple[int, ...] = (0, 0, 0, 1, 1),
    head_dim: int = 64,
    window: int | None = None,
    logit_softcap: float | None = None,
) -> None:
    """Of sequences with so many tokens in their pages and a new one, of which the pages know nothing yet."""
    step = make_step(
        [(length, 1) for length in past], page_size=16, head_dim=head_dim, kv_of_query=kv_of_query, window=window,
        logit_softcap=logit_softcap, dtype=dtype, cache_dtype=cache_dtype,
    )  # fmt: skip
    num_heads, num_kv = len(kv_of_query), step.key_cache.shape[2]
    qkv = torch.randn(len(past), num_heads + 2 * num_kv, head_dim).to(dtype)
    angles = torch.rand(len(past), 1, head_dim // 2).repeat(1, 1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q_norm, k_norm = torch.rand(2, head_dim).to(dtype) + 0.5 if norms else (None, None)
    q = rotated(qkv[:, :num_heads], cos, sin, q_norm)
    k = rotated(qkv[:, num_heads:-num_kv], cos, sin, k_norm)
    v = qkv[:, -num_kv:].double()
    caches = [step.key_cache.clone(), step.value_cache.clone()]
    scales = None if step.kv_scales is None else (step.kv_scales[0].clone(), step.kv_scales[1].clone())
    write_kv(k.to(dtype), v.to(dtype), caches[0], caches[1], slots_of(step), scales)
    held = caches if scales is None else [
        cache.double() * each.double().transpose(1, 2).unsqueeze(-1) for cache, each in zip(caches, scales, strict=True)
    ]  # fmt: skip
    expected = [
        formula(
            q[sequence][None],
            tokens_of(held[0], step, sequence),
            tokens_of(held[1], step, sequence),
            kv_of_query,
            window,
            logit_softcap,
        )
        for sequence in range(len(past))
    ]

    there = on(step, device)
    plan = plan_of(there)
    assert isinstance(plan, DevicePlan)
    norm_weights = [None if weight is None else weight.to(device) for weight in (q_norm, k_norm)]
    out = torch.full((len(past), num_heads, head_dim), float("nan"), dtype=dtype, device=device)
    heads = group_heads(kv_of_query, num_kv, device)
    with assumed(target):
        gpu.rope_and_decode(
            out, qkv.flatten(1).to(device), cos.to(device), sin.to(device), *norm_weights, there.key_cache,
            there.value_cache, plan.sequences, plan.pages, plan.room.counters(num_kv), heads.table,
            *(there.kv_scales or (None, None)), group=heads.group_size, scale=SCALE, eps=EPS, window=window or 0,
            logit_softcap=logit_softcap or 0.0, longest=plan.longest,
        )  # fmt: skip
    tolerance = EACH[dtype] if cache_dtype is None else 3e-2
    torch.testing.assert_close(out.double().cpu(), torch.cat(expected), rtol=tolerance, atol=tolerance)
    assert_the_same_pages((there.key_cache, there.value_cache), there.kv_scales, caches, scales)
    assert not plan.room.counters(num_kv).any()


@settings(max_examples=8)
@given(
    past=st.lists(st.integers(0, 300), min_size=1, max_size=3),
    norms=st.booleans(),
    kv_of_query=st.sampled_from(GROUPS),
    head_dim=st.sampled_from([64, 80, 128]),
    window=st.sampled_from([None, 1, 90]),
    logit_softcap=st.sampled_from([None, 0.5]),
)
def test_rotated_attended_and_written(
    past: list[int],
    norms: bool,
    kv_of_query: tuple[int, ...],
    head_dim: int,
    window: int | None,
    logit_softcap: float | None,
    device: torch.device,
) -> None:
    check(
        past, device, norms=norms, kv_of_query=kv_of_query, head_dim=head_dim, window=window,
        logit_softcap=logit_softcap,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    check([0, 15, 200], device, dtype=dtype, norms=True)


@pytest.mark.parametrize("target", [A100, H100], ids=["bits", "native"])
@pytest.mark.parametrize("cache_dtype", list(KV_DTYPES.values()), ids=list(KV_DTYPES))
def test_caches_in_8_bits(cache_dtype: torch.dtype, target: Target, device: torch.device) -> None:
    check([0, 15, 200], device, target, dtype=torch.bfloat16, cache_dtype=cache_dtype, head_dim=80)


@pytest.mark.parametrize("target", [A100, H100], ids=["bits", "native"])
@pytest.mark.parametrize("cache_dtype", list(KV_DTYPES.values()), ids=list(KV_DTYPES))
def test_tokens_of_chunks_are_written_in_8_bits(cache_dtype: torch.dtype, target: Target, device: torch.device) -> None:
    """Heads of zeros and of large numbers among them, and a token that is stored nowhere."""
    qkv = torch.randn(6, 3 * 3, 40).bfloat16()
    qkv[2, 4], qkv[3, 7, 5] = 0.0, 3e4
    cos, sin = torch.randn(2, 6, 1, 40).bfloat16()
    slots = torch.tensor([3, 17, 5, 0, 9, -1])
    k_TKD, v_TKD = rotated(qkv[:, 3:6], cos, sin, None).bfloat16(), qkv[:, 6:]
    keys, values = torch.zeros(2, 5, 4, 3, 40).to(cache_dtype)
    key_scales, value_scales = torch.zeros(2, 5, 3, 4).bfloat16()
    found = [each.clone().to(device) for each in (keys, values, key_scales, value_scales)]
    write_kv(k_TKD[:5], v_TKD[:5], keys, values, slots[:5], (key_scales, value_scales))
    with assumed(target):
        gpu.rope_and_write_kv(
            qkv.flatten(1).to(device), cos.to(device), sin.to(device), *found[:2], slots.to(device), None, None, 0.0,
            *found[2:],
        )  # fmt: skip
    assert_the_same_pages((found[0], found[1]), (found[2], found[3]), [keys, values], (key_scales, value_scales))


@pytest.mark.parametrize("lengths", [[(20, 1), (3, 1)], [(20, 1), (3, 5)]], ids=["decodes", "mixed"])
def test_the_public_operator_takes_any_step(lengths: list[tuple[int, int]], device: torch.device) -> None:
    """Decodes alone in one launch, with chunks by the two operators: the same as these on the CPU."""
    step = make_step(lengths, page_size=16, head_dim=64)
    num_tokens = sum(step.query_lengths)
    qkv = torch.randn(num_tokens, 9 * 64)
    table = (torch.randn(num_tokens, 1, 64), torch.randn(num_tokens, 1, 64))
    found: list[tuple[Any, ...]] = []
    for place in (torch.device("cpu"), device):
        there = on(step, place)
        here = [each.clone().to(place) for each in (qkv, *table, there.key_cache, there.value_cache)]
        with pytest.MonkeyPatch.context() as patch:
            if not found:
                patch.setattr("phalanx.kernels.triton_gpu.DEVICE_TYPE", "cuda")
            plan = plan_of(there)
            numbers = (range(len(lengths)), step.query_lengths, step.context_lengths)
            _, slots = token_places(step.page_tables, *numbers, page_size=16, device=place, plan=plan)
            heads = group_heads(step.kv_of_query, 2, place)
            out = rope_and_attend(here[0], (here[1], here[2]), here[3], here[4], slots, plan, heads, scale=SCALE)
            found.append((isinstance(plan, DevicePlan), out.cpu(), here[3].cpu(), here[4].cpu()))
    (by_torch, *expected), (by_triton, *actual) = found
    assert (by_torch, by_triton) == (False, True)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_it_is_registered(device: torch.device) -> None:
    step = on(make_step([(20, 1), (3, 1)], head_dim=64, page_size=16, poison=0.0), device)
    plan = plan_of(step)
    assert isinstance(plan, DevicePlan)
    out, qkv = torch.zeros_like(step.query), torch.randn(2, 9 * 64, device=device)
    angles = torch.randn(2, 1, 64, device=device)
    table = group_heads(step.kv_of_query, 2, device).table
    arguments = (
        out, qkv, angles, angles.clone(), None, None, step.key_cache, step.value_cache, plan.sequences, plan.pages,
        plan.room.counters(2), table, None, None,
    )  # fmt: skip
    settings = {"group": 3, "scale": SCALE, "eps": EPS, "window": 0, "logit_softcap": 0.0, "longest": 21}
    torch.library.opcheck(torch.ops.phalanx.rope_and_decode.default, arguments, settings)
