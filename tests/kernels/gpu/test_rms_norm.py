"""`rms_norm` and its kin in Triton against the formula in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error

from phalanx.kernels import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised

EPS = 1e-5
ERROR = {torch.float32: 1e-6, torch.bfloat16: 1e-4, torch.float16: 1e-4}
STEP = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2**-4}  # of a row's largest number; of each number
WIDTHS = st.one_of(st.integers(1, 300), st.sampled_from([576, 4096, 16384, 16385, 20000]))
dtypes = st.sampled_from(list(ERROR))


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return weight.double() * wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x with a gap between its rows, residual, weight."""
    x = torch.randn(rows, width + 3, device=device).to(dtype)[:, :width]
    return x, torch.randn(rows, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)


def check_quantised(q: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor) -> None:
    """Within half a step of the format, and of what float32 rounds before."""
    amax = expected.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(
        scale.double().unsqueeze(-1) * (127 if q.dtype == torch.int8 else 448), amax, rtol=1e-5, atol=1e-29
    )
    error = (q.double() * scale.double().unsqueeze(-1) - expected).abs()
    allowed = STEP[q.dtype] * (amax if q.dtype == torch.int8 else expected.abs() + amax * 2**-13)
    assert (error <= allowed * 1.001 + 1e-29).all()


@given(st.integers(0, 5), WIDTHS, dtypes)
@example(3, 576, torch.bfloat16)
@example(2, 20000, torch.bfloat16)
@settings(max_examples=12)
def test_rows(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(rows, width, dtype, device)
    with poisoned():
        normed = rms_norm(x, weight, EPS)
        normed_sum, total = add_rms_norm(x, residual, weight, EPS)
    assert normed.dtype == normed_sum.dtype == dtype
    assert torch.equal(total, x + residual)
    assert relative_error(normed, exact(x, weight)) < ERROR[dtype]
    assert relative_error(normed_sum, exact(x + residual, weight)) < ERROR[dtype]


@given(st.integers(1, 4), WIDTHS, st.sampled_from(list(STEP)))
@example(2, 576, torch.float8_e4m3fn)
@example(2, 20000, torch.int8)
@settings(max_examples=10)
def test_quantised_rows(device: torch.device, rows: int, width: int, dtype: torch.dtype) -> None:
    x, residual, weight = inputs(rows, width, torch.bfloat16, device)
    x[0] = 0
    with poisoned():
        q, scale = rms_norm_quantised(x, weight, EPS, dtype)
        q_sum, scale_sum, total = add_rms_norm_quantised(x, residual, weight, EPS, dtype)
    assert q.dtype == q_sum.dtype == dtype
    assert torch.equal(total, x + residual)
    check_quantised(q, scale, exact(x, weight))
    check_quantised(q_sum, scale_sum, exact(x + residual, weight))


def test_heads_of_a_larger_tensor(device: torch.device) -> None:
    heads = torch.randn(5, 7, 96, device=device).bfloat16()[:, 2:6]
    weight = torch.randn(96, device=device).bfloat16()
    assert relative_error(rms_norm(heads, weight, EPS), exact(heads, weight)) < ERROR[torch.bfloat16]


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rms_norm_quantised", "add_rms_norm_quantised"])
def test_it_is_registered(name: str, device: torch.device) -> None:
    x = torch.randn(3, 64, device=device)
    arguments = (x, x[0], EPS) if not name.startswith("add") else (x, x, x[0], EPS)
    if name.endswith("quantised"):
        arguments = (*arguments, torch.int8)
    torch.library.opcheck(getattr(torch.ops.phalanx, name).default, arguments)


def test_a_compiled_function_holds_the_operator_and_not_its_launches(device: torch.device) -> None:
    seen: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> Callable[..., object]:
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    x, weight = torch.randn(3, 64, device=device), torch.randn(64, device=device)
    function = torch.compile(lambda x: rms_norm(x, weight, EPS) + 1, backend=backend, fullgraph=True)
    torch.testing.assert_close(function(x), rms_norm(x, weight, EPS) + 1)
    assert any(name.startswith("phalanx.rms_norm") for name in seen), seen
