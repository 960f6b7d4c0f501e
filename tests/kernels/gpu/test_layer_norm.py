"""`layer_norm` and its kin in Triton against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error
from tests.kernels.gpu.test_rms_norm import EPS, ERROR, STEP, WIDTHS, check_quantised, dtypes, inputs

from phalanx.kernels import add_layer_norm, add_layer_norm_quantised, layer_norm, layer_norm_quantised


def exact(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = x.double() - x.double().mean(-1, keepdim=True)
    normed = weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed if bias is None else normed + bias.double()


@given(st.integers(0, 5), WIDTHS, dtypes, st.booleans())
@example(2, 20000, torch.bfloat16, True)
@settings(max_examples=12)
def test_rows(device: torch.device, rows: int, width: int, dtype: torch.dtype, biased: bool) -> None:
    x, residual, weight = inputs(rows, width, dtype, device)
    x += 3  # a mean to be taken out
    bias = torch.randn(width, device=device).to(dtype) if biased else None
    with poisoned():
        normed = layer_norm(x, weight, bias, EPS)
        normed_sum, total = add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(total, x + residual)
    # Of a row of few columns almost nothing may be left but its mean, whose rounding then counts for much.
    slack = 1e-3 if width < 8 else 0.0
    for actual, expected in ((normed, exact(x, weight, bias)), (normed_sum, exact(total, weight, bias))):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) < ERROR[dtype] + slack or expected.norm() < 1e-6


@given(st.integers(1, 4), WIDTHS, st.sampled_from(list(STEP)))
@example(2, 20000, torch.int8)
@settings(max_examples=10)
def test_quantised_rows(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(rows, max(width, 8), torch.bfloat16, device)
    bias = torch.randn_like(weight)
    with poisoned():
        q, scale = layer_norm_quantised(x, weight, bias, EPS, dtype)
        q_sum, scale_sum, total = add_layer_norm_quantised(x, residual, weight, bias, EPS, dtype)
    assert torch.equal(total, x + residual)
    check_quantised(q, scale, exact(x, weight, bias))
    check_quantised(q_sum, scale_sum, exact(total, weight, bias))


@pytest.mark.parametrize("name", ["layer_norm", "add_layer_norm", "layer_norm_quantised", "add_layer_norm_quantised"])
def test_it_is_registered(name: str, device: torch.device) -> None:
    x = torch.randn(3, 64, device=device)
    arguments = (x, x[0], x[1], EPS) if not name.startswith("add") else (x, x, x[0], None, EPS)
    if name.endswith("quantised"):
        arguments = (*arguments, torch.int8)
    torch.library.opcheck(getattr(torch.ops.phalanx, name).default, arguments)
