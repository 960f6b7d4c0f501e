"""The KV cache in 8 bits: what its numbers and scales are, and that native operators write the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.attention_steps import read_back
from tests.kernels.instruction_sets import every_set, needs_native, only, threads

from phalanx.kernels import KV_DTYPES, dequantise_kv, native_cpu, quantise_kv, rope_and_write_kv, write_kv

Cache = tuple[torch.Tensor, ...]
cache_dtypes = st.sampled_from(list(KV_DTYPES.values()))


def made(cache_dtype: torch.dtype, num_pages: int, page_size: int, num_kv: int, head_dim: int) -> Cache:
    """Keys and values, and the scales of both."""
    caches = torch.zeros(2, num_pages, page_size, num_kv, head_dim).to(cache_dtype)
    return (*caches, *torch.zeros(2, num_pages, num_kv, page_size, dtype=torch.bfloat16))


@given(
    cache_dtype=cache_dtypes,
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    size=st.sampled_from([1e-20, 1.0, 300.0, 1e20]),
)
def test_a_head_is_within_the_rounding_of_its_format(cache_dtype: torch.dtype, dtype: torch.dtype, size: float) -> None:
    """int8: half a step of a 127th of the largest; e4m3: 2^-4 of the number, or all of it below 2^-6 of a 448th of the
    largest. The scale is rounded up by 2^-7 at most.
    """
    x = (torch.randn(20, 3, 64) * size).to(dtype)
    q, scales = quantise_kv(x, cache_dtype)
    assert (q.dtype, scales.dtype, scales.shape) == (cache_dtype, torch.bfloat16, (20, 3))
    largest = x.double().abs().amax(-1, keepdim=True) * (1 + 2.0**-7)
    if cache_dtype == torch.int8:
        bound = largest / 127 / 2
    else:
        bound = torch.maximum(x.double().abs() * 2.0**-4, largest / 448 * 2.0**-6)
    error = (dequantise_kv(q, scales, torch.float64) - x.double()).abs()
    assert (error <= bound * (1 + 1e-6)).all()
    assert (q.double().abs().amax(-1) >= {torch.int8: 126, torch.float8_e4m3fn: 416}[cache_dtype]).all()


def test_zeros_stay_zeros_and_what_is_no_number_stays_none() -> None:
    x = torch.randn(3, 1, 8)
    x[0], x[1, 0, 3], x[2, 0, 3] = 0.0, float("inf"), float("nan")
    for dtype in KV_DTYPES.values():
        read = dequantise_kv(*quantise_kv(x, dtype), torch.float32)
        assert (read[0] == 0).all()
        assert not read[1:, 0, 3].isfinite().any()


@needs_native
@every_set
@settings(max_examples=25)
@given(
    num_tokens=st.sampled_from([1, 3, 200]),
    head_dim=st.sampled_from([2, 10, 40, 64, 96, 128]),
    page_size=st.sampled_from([5, 16]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    cache_dtype=cache_dtypes,
    special=st.sampled_from([0.0, 1e-35, 6e4, float("inf"), float("nan")]),
)
def test_native_pages_hold_the_bits_of_the_definition(
    chosen: int,
    num_tokens: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    special: float,
) -> None:
    """Of keys that are turned by an angle of zero, and values. Heads of zeros, of tiny numbers, with an outlier, and of
    what is no number.
    """
    num_kv, num_pages = 2, num_tokens // page_size + 2
    qkv = torch.randn(num_tokens, 3 * num_kv, head_dim).to(dtype)
    qkv[0, -1, :] = qkv[-1, num_kv, 0] = torch.tensor(special).to(dtype)
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    table = torch.ones(num_tokens, 1, head_dim).to(dtype), torch.zeros(num_tokens, 1, head_dim).to(dtype)
    found, expected = (made(cache_dtype, num_pages, page_size, num_kv, head_dim) for _ in range(2))

    def write(cache: Cache) -> None:
        keys, values, *scales = cache
        rope_and_write_kv(qkv.flatten(1).clone(), table, keys, values, slots, kv_scales=(scales[0], scales[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cpu, "LIBRARY", None)
        write(expected)
    with only(chosen), threads(3):
        write(found)
    for number in (0, 1):
        torch.testing.assert_close(found[2 + number], expected[2 + number], rtol=0, atol=0, equal_nan=True)
        read, wanted = (read_back(cache[number], cache[2 + number], slots) for cache in (found, expected))
        torch.testing.assert_close(read, wanted, rtol=0, atol=0, equal_nan=True)


def test_caches_in_8_bits_without_scales_are_refused_and_scales_without_them() -> None:
    keys, values, *scales = made(torch.int8, 2, 4, 1, 8)
    new = torch.randn(1, 1, 8)
    slots = torch.tensor([3])
    with pytest.raises(TypeError, match=r"KV cache of torch\.int8 has no scales"):
        write_kv(new, new, keys, values, slots)
    with pytest.raises(TypeError, match=r"KV cache of torch\.float32 takes none, but has scales"):
        write_kv(new, new, keys.float(), values.float(), slots, (scales[0], scales[1]))
