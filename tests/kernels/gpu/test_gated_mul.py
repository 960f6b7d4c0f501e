"""`silu_mul`, `gelu_mul` and their quantised forms in Triton against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error
from tests.kernels.gpu.test_rms_norm import ERROR, STEP, WIDTHS, check_quantised, dtypes

from phalanx.kernels import gelu_mul, gelu_mul_quantised, silu_mul, silu_mul_quantised

Activation = Callable[[torch.Tensor], torch.Tensor]


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def gelu(x: torch.Tensor) -> torch.Tensor:
    return x / 2 * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())


@given(st.integers(0, 4), WIDTHS, dtypes)
@example(2, 1536, torch.bfloat16)
@settings(max_examples=12)
def test_gates(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = (2 * torch.randn(rows, 2 * width + 3, device=device)).to(dtype)[:, : 2 * width]
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    for operator, activation in ((silu_mul, silu), (gelu_mul, gelu)):
        with poisoned():
            actual = operator(gate_up)
        assert actual.dtype == dtype
        assert relative_error(actual, activation(gate) * up) < ERROR[dtype]


@given(st.integers(1, 4), WIDTHS, st.sampled_from(list(STEP)))
@example(2, 20000, torch.int8)
@settings(max_examples=10)
def test_quantised(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * width, device=device).bfloat16()
    gate, up = gate_up[:, :width].double(), gate_up[:, width:].double()
    for operator, activation in ((silu_mul_quantised, silu), (gelu_mul_quantised, gelu)):
        with poisoned():
            q, scale = operator(gate_up, dtype)
        assert q.dtype == dtype
        check_quantised(q, scale, activation(gate) * up)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "silu_mul_quantised", "gelu_mul_quantised"])
def test_it_is_registered(name: str, device: torch.device) -> None:
    x = torch.randn(3, 64, device=device)
    arguments = (x, torch.int8) if name.endswith("quantised") else (x,)
    torch.library.opcheck(getattr(torch.ops.phalanx, name).default, arguments)
