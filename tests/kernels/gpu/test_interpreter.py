"""The interpreter that the other tests of this folder go by: its arithmetic against PyTorch's, and what it leaves."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

triton: Any = pytest.importorskip("triton", reason="needs Triton")
tl: Any = pytest.importorskip("triton.language", reason="needs Triton")

SIZE = 16


@triton.jit  # type: ignore[untyped-decorator]
def arithmetic_kernel(out, x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    total = tl.where(a > b, a * b + a, tl.maximum(b - a, -a)) + tl.sum(a, 1)[:, None] + tl.max(b, 0)[None, :]
    tl.store(out + at, total)


@triton.jit  # type: ignore[untyped-decorator]
def dot_kernel(out, x, y, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit  # type: ignore[untyped-decorator]
def cast_kernel(out, x, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@pytest.fixture(autouse=True)
def _interpreted_here(device: torch.device, _runs_kernels: None) -> Any:
    """The kernels of this file, which are no operators."""
    if device.type == "cuda":
        yield
        return
    from tests.kernels.gpu.interpreter import interpreted_kernel

    from phalanx.kernels.gpu.kernel_swap import swapped

    with swapped([sys.modules[__name__]], interpreted_kernel):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_as_pytorch_does(dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(2, SIZE, SIZE, device=device).to(dtype)
    out = torch.empty_like(a)
    arithmetic_kernel[(1,)](out, a, b, SIZE=SIZE)
    chosen = torch.where(a > b, a * b + a, torch.maximum(b - a, -a))
    tolerance = 4 * torch.finfo(dtype).eps  # sums in another order, and multiplied and added in one
    torch.testing.assert_close(out, chosen + a.sum(1)[:, None] + b.amax(0)[None], rtol=tolerance, atol=8 * tolerance)


def test_a_product_of_bfloat16_is_summed_in_float32(device: torch.device) -> None:
    a, b = torch.randn(2, SIZE, SIZE, device=device).bfloat16()
    out = torch.empty(SIZE, SIZE, device=device)
    dot_kernel[(1,)](out, a, b, SIZE=SIZE)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_casts_round_to_nearest_even(dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype.itemsize == 1 and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs a GPU with 8-bit floats (compute capability 8.9)")
    edges = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-4, 1 + 3 * 2**-4, 0.0, 2**-9, 2**-10, -3.0, 300.0, float("nan")]
    x = torch.tensor([*edges, *torch.randn(2 * SIZE - len(edges)).tolist()], device=device)
    there = torch.empty(2 * SIZE, dtype=dtype, device=device)
    cast_kernel[(1,)](there, x, SIZE=2 * SIZE)
    torch.testing.assert_close(there.float(), x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
    back = torch.empty_like(x)
    cast_kernel[(1,)](back, there, SIZE=2 * SIZE)
    torch.testing.assert_close(back, there.float(), rtol=0, atol=0, equal_nan=True)


def test_an_8_bit_float_saturates(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs a GPU with 8-bit floats (compute capability 8.9)")
    x = torch.full((SIZE,), 1e6, device=device)
    out = torch.empty(SIZE, dtype=torch.float8_e4m3fn, device=device)
    cast_kernel[(1,)](out, x, SIZE=SIZE)
    assert out.float().tolist() == [448.0] * SIZE
