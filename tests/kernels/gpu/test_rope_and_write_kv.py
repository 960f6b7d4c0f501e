"""`rope_table` and `rope_and_write_kv` in Triton against the formulas in float64."""

from __future__ import annotations

import math

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error
from tests.kernels.gpu.test_rms_norm import ERROR, dtypes
from tests.kernels.gpu.test_rms_norm import exact as exact_norm

from phalanx.kernels import rope_and_write_kv, rope_frequencies, rope_table

PAGE_SIZE = 4


@given(st.lists(st.integers(0, 2**20), max_size=5), st.integers(1, 80), dtypes)
@settings(max_examples=12)
def test_table(device: torch.device, positions: list[int], half: int, dtype: torch.dtype) -> None:
    frequencies = rope_frequencies(2 * half, 10000.0).to(device)
    with poisoned():
        cos, sin = rope_table(torch.tensor(positions, dtype=torch.int64, device=device), frequencies, dtype)
    assert cos.shape == sin.shape == (len(positions), 1, 2 * half)
    angles = torch.outer(torch.tensor(positions, dtype=torch.float32), frequencies.cpu()).repeat(1, 2).double()
    for actual, expected in ((cos, angles.cos()), (sin, angles.sin())):
        error = (actual[:, 0].double().cpu() - expected).abs()
        assert (error <= expected.abs() * torch.finfo(dtype).eps + 1e-7).all()


def rotated(x_TND: torch.Tensor, angles_TD: torch.Tensor) -> torch.Tensor:
    low, high = x_TND.chunk(2, -1)
    cos, sin = angles_TD.cos().unsqueeze(1), angles_TD.sin().unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), -1)


@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 3),
    st.sampled_from([2, 6, 64, 80, 128]),
    dtypes,
    st.sampled_from(["", "q", "k", "qk"]),
)
@example(3, 9, 3, 64, torch.bfloat16, "")
@example(3, 5, 2, 128, torch.bfloat16, "qk")
@settings(max_examples=12)
def test_heads_are_rotated_and_stored(
    device: torch.device, num_tokens: int, queries: int, keys: int, head_dim: int, dtype: torch.dtype, norms: str
) -> None:
    qkv = torch.randn(num_tokens, (queries + 2 * keys) * head_dim + 8, device=device).to(dtype)[:, :-8]
    caches = torch.full((2, 4, keys, PAGE_SIZE, head_dim), math.nan, dtype=dtype, device=device).transpose(2, 3)
    q_norm, k_norm = (torch.randn(head_dim, device=device).to(dtype) if name in norms else None for name in "qk")
    positions = torch.randint(0, 50, (num_tokens,), device=device)
    table = rope_table(positions, rope_frequencies(head_dim, 100.0).to(device), torch.float32)
    slots = torch.randperm(4 * PAGE_SIZE, device=device)[:num_tokens]
    slots[0] = -1  # a row that only pads the batch
    heads = qkv.reshape(num_tokens, -1, head_dim).double()
    with poisoned():
        actual = rope_and_write_kv(qkv, table, caches[0], caches[1], slots, q_norm=q_norm, k_norm=k_norm, eps=1e-5)
    angles = torch.outer(positions.double(), rope_frequencies(head_dim, 100.0).to(device).double())
    q, k, v = torch.split(heads, [queries, keys, keys], 1)
    q = rotated(q if q_norm is None else exact_norm(q, q_norm), angles)
    k = rotated(k if k_norm is None else exact_norm(k, k_norm), angles)
    assert actual.dtype == dtype
    assert relative_error(actual, q) < ERROR[dtype]
    flat_keys, flat_values = (cache.reshape(-1, keys, head_dim) for cache in caches)
    if num_tokens > 1:
        assert relative_error(flat_keys[slots[1:]], k[1:]) < ERROR[dtype]
        assert torch.equal(flat_values[slots[1:]].double(), v[1:])
    untouched = torch.ones(4 * PAGE_SIZE, dtype=torch.bool, device=device)
    untouched[slots[1:]] = False
    assert flat_keys[untouched].isnan().all()
    assert flat_values[untouched].isnan().all()


def test_they_are_registered(device: torch.device) -> None:
    positions = torch.arange(3, device=device)
    frequencies = rope_frequencies(16, 100.0).to(device)
    torch.library.opcheck(torch.ops.phalanx.rope_table.default, (positions, frequencies, torch.float32))
    cos, sin = rope_table(positions, frequencies, torch.float32)
    caches = torch.zeros(2, 2, PAGE_SIZE, 2, 16, device=device)
    qkv = torch.randn(3, 7 * 16, device=device)
    arguments = (qkv, cos, sin, caches[0], caches[1], positions, None, None, 0.0)
    torch.library.opcheck(torch.ops.phalanx.rope_and_write_kv.default, arguments)
