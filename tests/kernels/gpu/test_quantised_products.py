"""Products by quantised weights, with activations as they are and quantised, against the formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned, relative_error

from phalanx.kernels import quantise_rows
from phalanx.kernels.gpu.linear_fp8_w8a8 import multiply as multiply_fp8_w8a8
from phalanx.kernels.gpu.linear_fp8_w8a16 import multiply as multiply_fp8_w8a16
from phalanx.kernels.gpu.linear_parts import counters_of
from phalanx.kernels.gpu.linear_w4a16 import multiply as multiply_w4a16
from phalanx.kernels.gpu.linear_w4a16 import pack_int4, unpack_int4
from phalanx.kernels.gpu.linear_w8a8 import multiply as multiply_w8a8
from phalanx.kernels.gpu.linear_w8a16 import multiply as multiply_w8a16
from phalanx.kernels.gpu.target import Target, assumed, target_of
from phalanx.kernels.linear_table import Choice

ERROR = 2e-4  # beyond rounding: sums in float32, of integers that are 128 too large, or 1024
ROUNDED = 5e-3  # where weights are scaled and rounded to bfloat16 first
E4M3 = torch.float8_e4m3fn
FEW = Choice("stream_k", 16, 32, 128, num_warps=4, num_stages=3, per_sm=1)
MANY = Choice("tiles", 32, 32, 64, num_warps=4, num_stages=3)
dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
choices = st.sampled_from([FEW, MANY])


@pytest.fixture(autouse=True)
def _few_programs(_runs_kernels: None) -> Iterator[None]:
    """Of an assumed GPU; 5 divides few numbers of tiles."""
    with assumed(Target(90, 5)):
        yield


def spread(scales: torch.Tensor, group: int, k: int) -> torch.Tensor:
    """Scales [groups, n] of each weight, [n, k]."""
    return scales.double().repeat_interleave(group, 0)[:k].T


def error_of(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor) -> float:
    """As `relative_error`, of what was added up: sums may be next to nothing beside it."""
    rounding = (exact.to(actual.dtype).double() - exact).norm()
    beyond = ((actual.double() - exact).norm() - rounding) / magnitude.norm()
    return math.inf if beyond.isnan() else beyond.item()


def drawn(m: int, k: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """With gaps between rows."""
    return torch.randn(m, k + 8, device=device).to(dtype)[:, :k]


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), st.data())
@settings(max_examples=15)
def test_w4a16(device: torch.device, m: int, n: int, k: int, data: st.DataObject) -> None:
    group, dtype, choice = (
        data.draw(st.sampled_from([8, 16, 24, 32, 64, 128, k])),
        data.draw(dtypes),
        data.draw(choices),
    )
    offsets_too, biased = data.draw(st.booleans()), data.draw(st.booleans())
    groups = -(-k // group)
    q = torch.randint(0, 16, (n, k), device=device) - (0 if offsets_too else 8)
    scales = (torch.rand(groups, n, device=device) + 0.5).half()
    offsets = torch.randn(groups, n, device=device).half() if offsets_too else None
    bias = torch.randn(n, device=device).to(dtype) if biased else None
    x = drawn(m, k, dtype, device)
    packed = pack_int4(q, signed=not offsets_too)
    assert torch.equal(unpack_int4(packed, k, signed=not offsets_too), q.to(torch.int8))
    weight = q.double() * spread(scales, group, k)
    if offsets is not None:
        weight += spread(offsets, group, k)
    added = torch.zeros(n, dtype=torch.float64, device=device) if bias is None else bias.double()
    exact = x.double() @ weight.T + added
    magnitude = x.double().abs() @ (weight.abs() + spread(scales, group, k)).T + added.abs()
    with poisoned():
        y = multiply_w4a16(x, packed, scales, offsets, bias, group, choice=choice)
    rounds = choice is MANY or group in (8, 24)
    assert error_of(y, exact, magnitude) < (ROUNDED if rounds and dtype != torch.float32 else ERROR)
    assert not counters_of(x).any()


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), dtypes, choices, st.data())
@settings(max_examples=12)
def test_eight_bits_with_activations_as_they_are(
    device: torch.device, m: int, n: int, k: int, dtype: torch.dtype, choice: Choice, data: st.DataObject
) -> None:
    group, fp8 = data.draw(st.sampled_from([8, 32, 128, k])), data.draw(st.booleans())
    x = drawn(m, k, dtype, device)
    scales = torch.rand(-(-k // group), n, device=device) + 0.5
    offsets = torch.randn_like(scales) if not fp8 and data.draw(st.booleans()) else None
    if fp8:
        q = (torch.randn(n, k, device=device) * 10.0 ** torch.randint(-4, 3, (n, k), device=device)).clamp(-448, 448)
        q = q.to(E4M3)
    else:
        q = torch.randint(-128, 128, (n, k), device=device).to(torch.int8)
    weight = q.double() * spread(scales, group, k)
    if offsets is not None:
        weight += spread(offsets, group, k)
    with poisoned():
        if fp8:
            y = multiply_fp8_w8a16(x, q, scales, None, group, choice=choice)
        else:
            y = multiply_w8a16(x, q, scales, offsets, None, group, choice=choice)
    rounds = dtype != torch.float32 and group < k and (choice is MANY or group == 8)
    magnitude = x.double().abs() @ (weight.abs() + spread(scales, group, k)).T
    assert error_of(y, x.double() @ weight.T, magnitude) < (ROUNDED if rounds else ERROR)


def test_every_number_of_e4m3_is_decoded_exactly(device: torch.device) -> None:
    every = torch.arange(256, dtype=torch.uint8, device=device).view(E4M3)
    numbers = every[~every.float().isnan()].unsqueeze(1)
    ones = torch.ones(len(numbers), 1, device=device)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = multiply_fp8_w8a16(torch.ones(1, 1, device=device, dtype=dtype), numbers, ones.T, None, 1)
        assert torch.equal(y.float(), numbers.float().T)


@pytest.mark.parametrize("fp8", [False, True])
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 300), choices)
@example(33, 64, 320, MANY)  # by descriptors
@settings(max_examples=12)
def test_both_quantised(device: torch.device, fp8: bool, m: int, n: int, k: int, choice: Choice) -> None:
    if fp8 and target_of(torch.empty(0, device=device)).arch < 89:
        pytest.skip("needs a GPU with matrix units for fp8, or none")
    x, bias = drawn(m, k, torch.bfloat16, device), torch.randn(n, device=device)
    a, a_scales = quantise_rows(x, E4M3 if fp8 else torch.int8)
    w, scales = quantise_rows(torch.randn(n, k, device=device), E4M3 if fp8 else torch.int8)
    if fp8 and n % 2:
        scales = scales[:1]  # of the tensor
    rows, weight = a.double() * a_scales.double().unsqueeze(1), w.double() * scales.double().unsqueeze(1)
    exact, magnitude = rows @ weight.T + bias.double(), rows.abs() @ weight.abs().T + bias.double().abs()
    multiply = multiply_fp8_w8a8 if fp8 else multiply_w8a8
    with poisoned():
        y = multiply(a, a_scales, w, scales, bias, torch.float32, choice=choice)
    # Hopper's own sums of fp8 have about 14 bits.
    assert error_of(y, exact, magnitude) < (1e-3 if fp8 and device.type == "cuda" else 1e-6)


@pytest.mark.parametrize("choice", [FEW, MANY])
@pytest.mark.parametrize("outputs", ["blocks", "each"])
def test_fp8_by_blocks(device: torch.device, choice: Choice, outputs: str) -> None:
    m, n, k = 20, 200, 384
    a, a_scales = quantise_rows(drawn(m, k, torch.bfloat16, device), E4M3, 128)
    w = torch.randn(n, k, device=device).to(E4M3)
    scales = torch.rand(2 if outputs == "blocks" else n, 3, device=device)
    each = scales.repeat_interleave(128, 0)[:n] if outputs == "blocks" else scales
    exact = (a.double() * a_scales.double().repeat_interleave(128, 1)) @ (
        w.double() * each.double().repeat_interleave(128, 1)
    ).T
    with poisoned():
        y = multiply_fp8_w8a8(a, a_scales, w, scales, None, torch.bfloat16, choice=choice)
    assert relative_error(y, exact) < 1e-3
    of_rows = multiply_fp8_w8a8(a, a_scales[:, 0].contiguous(), w, scales, None, torch.float32)  # mixed
    exact = (a.double() * a_scales[:, :1].double()) @ (w.double() * each.double().repeat_interleave(128, 1)).T
    assert relative_error(of_rows, exact) < 1e-3


@given(st.integers(1, 5), st.integers(1, 40), st.sampled_from([None, 8]), st.sampled_from([torch.int8, E4M3]))
@example(2, 600, None, torch.int8)  # 4800 columns, more than one block
@settings(max_examples=15)
def test_rows_are_quantised_as_by_the_reference(
    device: torch.device, num_rows: int, eighths: int, group: int | None, dtype: torch.dtype
) -> None:
    x = drawn(num_rows, 8 * eighths, torch.bfloat16, device)
    x[0, :8] = 0
    with poisoned():
        q, scales = quantise_rows(x, dtype, group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("phalanx.kernels.triton_gpu.DEVICE_TYPE", "none")
        expected, expected_scales = quantise_rows(x, dtype, group)
    torch.testing.assert_close(scales, expected_scales)
    # A last bit of float32 decides which way a number goes that lies halfway between two.
    step = 1.0 if dtype == torch.int8 else 32.0
    assert ((q.float() - expected.float()).abs() <= step).all()
    exact = x.double() / scales.double().reshape(num_rows, -1).repeat_interleave(group or 8 * eighths, 1)
    halfway = (q.float() + expected.float()).double() / 2
    near = (exact - halfway).abs() <= 2.0**-20 * exact.abs()
    assert ((q.float() == expected.float()) | near).all()


def test_they_are_registered(device: torch.device) -> None:
    operators = torch.ops.phalanx
    x = torch.randn(3, 64, device=device)
    q = torch.randint(-8, 8, (32, 64), device=device).to(torch.int8)
    scales = torch.rand(2, 32, device=device)
    packed = pack_int4(q, signed=True)
    torch.library.opcheck(operators.linear_w4a16.default, (x, packed, scales, None, None, 32))
    torch.library.opcheck(operators.linear_w8a16.default, (x, q, scales, scales.clone(), None, 32))
    torch.library.opcheck(operators.quantise_rows.default, (x, torch.int8, 32))
    ones = torch.ones(3, device=device), torch.ones(32, device=device)
    torch.library.opcheck(operators.linear_w8a8.default, (q[:3].contiguous(), ones[0], q, ones[1], None, x.dtype))
    # What PyTorch's check calculates of inputs it cannot of fp8.
    torch.library.opcheck(
        operators.linear_fp8_w8a8.default,
        (q[:3].to(E4M3), ones[0], q.to(E4M3), ones[1], None, x.dtype),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )
    torch.library.opcheck(
        operators.linear_fp8_w8a16.default,
        (x, q.to(E4M3), scales, None, 32),
        test_utils=("test_faketensor", "test_autograd_registration"),
    )
