"""`linear` and what follows it, by each kernel, against the formulas in float64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error
from tests.kernels.gpu.test_gated_mul import gelu, silu

from phalanx.kernels import gated_linear, linear, linear_add
from phalanx.kernels.gpu.linear import multiply
from phalanx.kernels.gpu.linear_parts import counters_of
from phalanx.kernels.gpu.target import Target, assumed
from phalanx.kernels.linear_table import CUBLAS, Choice

ERROR = 1e-4  # beyond rounding: sums in float32
STREAM_K = Choice("stream_k", 16, 16, 64, num_warps=4, num_stages=3, per_sm=1)
PERSISTENT = Choice("persistent", 32, 32, 32, num_warps=4, num_stages=3)
dtypes = st.sampled_from([torch.bfloat16, torch.float16])


@pytest.fixture(autouse=True)
def _few_programs(_runs_kernels: None) -> Iterator[None]:
    """Of an assumed GPU; 5 divides few numbers of tiles."""
    with assumed(Target(90, 5)):
        yield


class Given:
    """Inputs of a product, with gaps between rows, and what is to come out, in float64."""

    def __init__(self, m: int, n: int, k: int, dtype: torch.dtype, extras: str, device: torch.device) -> None:
        self.x = torch.randn(m, k + 8, device=device).to(dtype)[:, :k]
        self.weight = (torch.randn(n, k + 16, device=device) / k**0.5).to(dtype)[:, :k]
        self.gate = {"s": "silu", "g": "gelu"}.get(extras[-1:], "")
        self.bias = torch.randn(n, device=device).to(dtype) if "b" in extras else None
        outputs = n // 2 if self.gate else n
        self.residual = torch.randn(m, outputs, device=device).to(dtype) if "r" in extras else None
        y = self.x.double() @ self.weight.double().T
        y = y if self.bias is None else y + self.bias.double()
        if self.gate:
            y = (silu if self.gate == "silu" else gelu)(y[:, :outputs]) * y[:, outputs:]
        self.exact = y if self.residual is None else y + self.residual.double()

    def by(self, choice: Choice) -> torch.Tensor:
        with poisoned():
            return multiply(self.x, self.weight, self.bias, residual=self.residual, gate=self.gate, choice=choice)


extras = st.sampled_from(["", "b", "r", "br", "s", "g", "bs", "brg"])


@given(st.integers(1, 20), st.integers(1, 50), st.integers(1, 400), dtypes, extras)
@example(1, 48, 320, torch.bfloat16, "")  # whole blocks
@example(17, 33, 130, torch.bfloat16, "brs")
@settings(max_examples=25)
def test_stream_k(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, extras: str) -> None:
    product = Given(m, 2 * n, k, dtype, extras, device)
    assert relative_error(product.by(STREAM_K), product.exact) < ERROR
    assert not counters_of(product.x).any()


@given(st.integers(1, 80), st.integers(1, 10), st.integers(1, 12), dtypes, extras)
@example(33, 9, 5, torch.bfloat16, "brs")
@settings(max_examples=20)
def test_persistent(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, extras: str) -> None:
    product = Given(m, 16 * n, 8 * k, dtype, extras, device)
    assert relative_error(product.by(PERSISTENT), product.exact) < ERROR


@pytest.mark.parametrize("extras", ["br", "g"])
def test_persistent_without_tma(device: torch.device, extras: str) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9:
        pytest.skip("needs a GPU before Hopper, or none")
    product = Given(70, 96, 80, torch.bfloat16, extras, device)
    with assumed(Target(80, 5)):
        assert relative_error(product.by(PERSISTENT), product.exact) < ERROR


@pytest.mark.parametrize("extras", ["", "b", "r", "br", "g", "s"])
def test_cublas_is_followed_by_the_same(device: torch.device, extras: str) -> None:
    product = Given(5, 32, 64, torch.bfloat16, extras, device)
    assert relative_error(product.by(CUBLAS), product.exact) < 5e-3  # rounded between


def test_unaligned_rows_are_left_to_cublas(device: torch.device) -> None:
    product = Given(5, 32, 61, torch.bfloat16, "", device)
    product.x = product.x.contiguous()
    assert relative_error(product.by(PERSISTENT), product.exact) < ERROR


def test_partial_sums_are_added_in_order_whoever_comes_last(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Given(3, 64, 1000, torch.bfloat16, "", device)
    choice = Choice("stream_k", 16, 32, 32, num_warps=4, num_stages=3, per_sm=2)
    first = product.by(choice)
    if device.type == "cuda":
        assert all(torch.equal(product.by(choice), first) for _ in range(50))
        return
    from triton.runtime.interpreter import InterpreterBuilder

    for seed in range(3):  # the programs in another order
        order = random.Random(seed).sample(range(10), 10)
        monkeypatch.setattr(
            InterpreterBuilder, "set_grid_idx", lambda self, x, y, z, o=order: setattr(self, "grid_idx", (o[x], y, z))
        )
        assert torch.equal(product.by(choice), first)


def test_the_public_operators_come_here(device: torch.device) -> None:
    product = Given(4, 64, 128, torch.bfloat16, "br", device)
    x, weight, bias, residual = product.x, product.weight, product.bias, product.residual
    assert residual is not None
    expected = multiply(x, weight, bias)
    assert torch.equal(linear(x, weight, bias), expected)
    assert torch.equal(linear_add(x, weight, residual, bias), multiply(x, weight, bias, residual=residual))
    assert torch.equal(gated_linear(x, weight, "gelu", bias), multiply(x, weight, bias, gate="gelu"))
    empty = linear(x[:0], weight, bias)
    assert empty.shape == (0, 64)


def test_they_are_registered(device: torch.device) -> None:
    x, weight = torch.randn(3, 64, device=device), torch.randn(32, 64, device=device)
    operators = torch.ops.phalanx
    torch.library.opcheck(operators.linear.default, (x, weight, weight[:, 0].contiguous()))
    torch.library.opcheck(operators.linear_add.default, (x, weight, x[:, :32].contiguous(), None))
    torch.library.opcheck(operators.gated_linear.default, (x, weight, "silu", None))
