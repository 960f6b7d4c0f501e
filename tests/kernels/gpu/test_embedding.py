"""`embedding` in Triton: rows of a shard, zeros elsewhere; to the bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned

from phalanx.kernels import embedding


@given(
    st.lists(st.integers(0, 49), max_size=6),
    st.integers(1, 20),
    st.integers(0, 30),
    st.one_of(st.integers(1, 130), st.just(2500)),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
@settings(max_examples=15)
def test_rows_of_the_shard(
    device: torch.device, tokens: list[int], rows: int, first: int, width: int, dtype: torch.dtype
) -> None:
    weight = torch.randn(rows, width + 5, device=device).to(dtype)[:, :width]
    with poisoned():
        found = embedding(torch.tensor(tokens, dtype=torch.int64, device=device), weight, first)
    assert found.shape == (len(tokens), width)
    for row, token in zip(found, tokens, strict=True):
        expected = weight[token - first] if first <= token < first + rows else torch.zeros_like(weight[0])
        assert torch.equal(row, expected)


def test_it_is_registered(device: torch.device) -> None:
    weight = torch.randn(10, 64, device=device)
    torch.library.opcheck(torch.ops.phalanx.embedding.default, (torch.tensor([3, 12], device=device), weight, 2))
