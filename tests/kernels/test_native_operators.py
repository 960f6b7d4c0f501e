"""The native norms, gates, rotations and searches in every set of instructions that this processor has, against PyTorch
in float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.instruction_sets import every_set, needs_native, only, threads

from phalanx.kernels import (
    add_rms_norm,
    argmax,
    argmax_keys,
    columns_of_keys,
    gelu_mul,
    native_cpu,
    rms_norm,
    rope_and_write_kv,
    rope_frequencies,
    rope_table,
    silu_mul,
    top,
    widen,
)

pytestmark = needs_native

dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
# Above and below what is given to several threads.
rows = st.sampled_from([1, 3, 300])
EPS = 1e-5


def assert_rounded_once(actual: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> None:
    """scale: of the largest terms that were added up, for the error in float32, 2^-19 of it."""
    dtype = actual.dtype
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2 * exact.abs()
    bound = rounding + 2.0**-19 * scale + torch.finfo(dtype).tiny
    error = (actual.double() - exact).abs()
    assert (error <= bound).all(), f"{float((error / bound).max()):.2f} times the bound"


@every_set
@settings(max_examples=30)
@given(rows, st.integers(1, 700), dtypes, st.booleans())
def test_norms(chosen: int, num_rows: int, width: int, dtype: torch.dtype, strided: bool) -> None:
    x = torch.randn(num_rows, 2, width).to(dtype)[:, 0] if strided else torch.randn(num_rows, width).to(dtype)
    residual, weight = torch.randn(num_rows, width).to(dtype), torch.randn(width).to(dtype)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return x.double() * (x.double().square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.double()

    with only(chosen), threads(3):
        found = rms_norm(x, weight, EPS)
        found_sum_norm, found_sum = add_rms_norm(x, residual, weight, EPS)
    assert_rounded_once(found, normed(x), normed(x).abs())
    assert torch.equal(found_sum, x + residual)
    assert_rounded_once(found_sum_norm, normed(found_sum), normed(found_sum).abs())


@every_set
@settings(max_examples=30)
@given(rows, st.integers(1, 300), dtypes, st.sampled_from([1.0, 8.0, 60.0]))
def test_gates(chosen: int, num_rows: int, width: int, dtype: torch.dtype, spread: float) -> None:
    gate_up = (spread * torch.randn(num_rows, 2 * width)).to(dtype)
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    with only(chosen), threads(3):
        found_silu, found_gelu = silu_mul(gate_up), gelu_mul(gate_up)
    scale = (gate * up).abs()
    assert_rounded_once(found_silu, gate * gate.sigmoid() * up, scale)
    assert_rounded_once(found_gelu, torch.nn.functional.gelu(gate, approximate="tanh") * up, scale)


@every_set
@settings(max_examples=30)
@given(
    num_tokens=rows,
    num_queries=st.integers(1, 5),
    num_kv=st.integers(1, 3),
    head_dim=st.sampled_from([2, 16, 24, 64, 80, 128, 256]),
    page_size=st.sampled_from([1, 16, 48]),
    normed=st.booleans(),
    dtype=dtypes,
)
def test_rotation_with_kv_write(
    chosen: int,
    num_tokens: int,
    num_queries: int,
    num_kv: int,
    head_dim: int,
    page_size: int,
    normed: bool,
    dtype: torch.dtype,
) -> None:
    """Against PyTorch's own operators, in float64 but for what is rounded between them."""
    qkv = torch.randn(num_tokens, (num_queries + 2 * num_kv) * head_dim).to(dtype)
    num_pages = num_tokens // page_size + 2
    shape = (2, num_pages, page_size, num_kv, head_dim)
    slots = torch.randperm(num_pages * page_size)[:num_tokens]
    table = rope_table(torch.randint(0, 500, (num_tokens,)), rope_frequencies(head_dim, 10000.0), dtype)
    q_norm, k_norm = torch.randn(2, head_dim).to(dtype)
    caches = torch.full(shape, float("nan"), dtype=dtype)
    exact_caches = torch.full(shape, float("nan"), dtype=torch.float64)

    def prepared(qkv: torch.Tensor) -> torch.Tensor:
        """Heads normalised, and rounded as the operator does; then everything in float64."""
        heads = qkv.clone().view(num_tokens, -1, head_dim)
        if normed:
            for part, norm in ((heads[:, :num_queries], q_norm), (heads[:, num_queries:-num_kv], k_norm)):
                part.copy_(rms_norm(part, norm, EPS))
        return heads.view(num_tokens, -1).double()

    with only(chosen):
        exact_qkv = prepared(qkv)
    exact_table = (table[0].double(), table[1].double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cpu, "LIBRARY", None)
        exact = rope_and_write_kv(exact_qkv, exact_table, exact_caches[0], exact_caches[1], slots)
    with only(chosen), threads(3):
        found = rope_and_write_kv(
            qkv,
            table,
            caches[0],
            caches[1],
            slots,
            q_norm=q_norm if normed else None,
            k_norm=k_norm if normed else None,
            eps=EPS,
        )
    largest = exact_qkv.abs().max()
    assert_rounded_once(found, exact, largest)
    written = ~exact_caches.isnan()
    assert torch.equal(~caches.isnan(), written)
    assert_rounded_once(caches[written], exact_caches[written], largest)
    assert torch.equal(caches[1][written[1]].double(), exact_caches[1][written[1]])


@every_set
@settings(max_examples=40)
@given(
    num_rows=st.sampled_from([1, 5]),
    width=st.integers(1, 300) | st.sampled_from([16384, 16385, 50000]),
    num_values=st.sampled_from([2, 50, 10**6]),
    special=st.sampled_from([0.0, -0.0, float("inf"), float("-inf"), float("nan")]),
    count=st.integers(1, 300),
    dtype=dtypes,
)
def test_searches_take_the_first_of_equals(
    chosen: int, num_rows: int, width: int, num_values: int, special: float, count: int, dtype: torch.dtype
) -> None:
    """Few values have many equals. PyTorch's stable sort puts not-a-numbers first, too."""
    x = (torch.randint(-num_values, num_values, (num_rows, width)).float() / 7).to(dtype)
    x[torch.rand(num_rows, width) < 0.02] = special
    count = min(count, width)
    values, columns = x.sort(dim=1, descending=True, stable=True)
    with only(chosen), threads(3):
        assert torch.equal(argmax(x), columns[:, 0])
        halves = [(first, x[:, first:stop]) for first, stop in ((0, width // 3), (width // 3, width)) if first < stop]
        keys = [argmax_keys(half.contiguous(), first) for first, half in halves]
        assert torch.equal(columns_of_keys(torch.stack(keys).amax(0)), columns[:, 0])
        assert all(torch.equal(argmax_keys(half, first), key) for key, (first, half) in zip(keys, halves, strict=True))
        found_values, found_columns = top(x.float(), count)
    assert torch.equal(found_columns, columns[:, :count])
    torch.testing.assert_close(found_values, values[:, :count].float(), rtol=0, atol=0, equal_nan=True)


@every_set
def test_searches_of_rows_of_minus_infinity(chosen: int) -> None:
    x = torch.full((2, 500), float("-inf"))
    x[1, 77] = -1e30
    with only(chosen):
        assert argmax(x).tolist() == [0, 77]
        assert top(x, 3)[1].tolist() == [[0, 1, 2], [77, 0, 1]]


@pytest.mark.parametrize("shape", [(1, 0), (1, 7), (1, 49152), (17, 4097)])
def test_bfloat16_widens_to_the_same_numbers(shape: tuple[int, int]) -> None:
    bits = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)
    bits[:, :1] = 0x7F80  # infinity
    x = bits.view(torch.bfloat16)
    assert torch.equal(widen(x).view(torch.int32), bits.to(torch.int32) << 16)


def test_other_numbers_widen_too() -> None:
    x = torch.randn(3, 8)
    assert torch.equal(widen(x.half()), x.half().float())
    assert torch.equal(widen(x.bfloat16().T), x.bfloat16().float().T)
