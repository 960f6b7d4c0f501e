"""`argmax` and `top` in Triton: what a stable sort finds, to the bit."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned

from phalanx.kernels import argmax, top

widths = st.one_of(st.integers(1, 40), st.sampled_from([4096, 5000, 9000]))


def coarse(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Few values, so that many are equal, of both signs of zero; and rows with a gap between."""
    x = (torch.randn(rows, width + 3, device=device) * 2).round().to(dtype)[:, :width]
    x[x.abs() > 3] = -math.inf
    return x


@given(st.integers(1, 3), widths, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@settings(max_examples=15)
def test_the_first_of_the_largest(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x = coarse(rows, width, dtype, device)
    with poisoned():
        found = argmax(x)
    assert torch.equal(found, x.sort(dim=1, descending=True, stable=True).indices[:, 0])


@given(st.integers(1, 2), widths, st.integers(1, 40), st.sampled_from([torch.float32, torch.bfloat16]))
@example(2, 9000, 700, torch.float32)  # three rounds
@example(1, 3000, 1025, torch.float32)  # more than a tournament finds
@settings(max_examples=10)
def test_the_best_in_order(device: torch.device, rows: int, width: int, count: int, dtype: torch.dtype) -> None:
    count = min(count, width)
    x = coarse(rows, width, dtype, device)
    x[:, : count // 2] = torch.randn(rows, count // 2, device=device).to(dtype)
    with poisoned():
        values, columns = top(x, count)
    expected = x.sort(dim=1, descending=True, stable=True)
    assert torch.equal(values, expected.values[:, :count])
    assert torch.equal(columns, expected.indices[:, :count])


@pytest.mark.parametrize(("name", "extra"), [("argmax", ()), ("top", (3,))])
def test_they_are_registered(name: str, extra: tuple[int, ...], device: torch.device) -> None:
    arguments = (torch.randn(2, 40, device=device), *extra)
    torch.library.opcheck(getattr(torch.ops.phalanx, name).default, arguments)
