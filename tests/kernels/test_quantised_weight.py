"""Weights of 8 and 4 bits and in FP8: how they are held, products by them, and the quantising."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.native_library import excuse_for_no_library

from phalanx.kernels import QuantisedRows, QuantisedWeight, WeightFormat, linear, make_quantised, quantise
from phalanx.kernels.quantised_weight import dequantise
from phalanx.native import find_native

LIBRARY = find_native().library
NAMES: tuple[str, ...] = LIBRARY.linear_sets if LIBRARY is not None else ()

needs_library = pytest.mark.skipif(not NAMES and bool(excuse_for_no_library()), reason="needs native products")

INT8, INT4 = WeightFormat(8), WeightFormat(4, 32, torch.float16, offsets=True)

FORMATS = [
    WeightFormat(8),
    WeightFormat(8, 32, torch.float16),
    WeightFormat(8, 64, torch.bfloat16, offsets=True),
    WeightFormat(4),
    WeightFormat(4, 8, torch.float16),
    WeightFormat(4, 32, torch.float16),
    WeightFormat(4, 128, torch.bfloat16, offsets=True),
    WeightFormat(4, 32, torch.float16, zeros=True),
    WeightFormat(8, None, torch.bfloat16, zeros=True),
    WeightFormat(8, e4m3=True),
    WeightFormat(8, 128, torch.bfloat16, e4m3=True),
    WeightFormat(8, activations=True),
    WeightFormat(8, 96, torch.float16, zeros=True, activations=True, input_group=40),
    WeightFormat(4, 128, torch.bfloat16, activations=True),
    WeightFormat(4, 32, torch.float16, offsets=True, activations=True),
]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    if LIBRARY is not None:
        LIBRARY.resize_pool(2)
    yield
    if LIBRARY is not None:
        LIBRARY.resize_pool(1)


def random_rows(num_outputs: int, num_inputs: int, held: WeightFormat, seed: int) -> QuantisedRows:
    """Of all numbers that there are."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 128) if held.bits == 8 else (0, 16) if held.offsets or held.zeros else (-8, 8)
    groups = num_outputs, held.num_groups(num_inputs)
    scales = torch.rand(groups, generator=generator).add(0.1).to(held.scale_dtype)
    offsets = torch.randn(groups, generator=generator).to(held.scale_dtype) if held.offsets else None
    zeros = torch.randint(0, 2**held.bits, groups, generator=generator, dtype=torch.uint8) if held.zeros else None
    q = torch.randint(low, high, (num_outputs, num_inputs), generator=generator, dtype=torch.int8)
    if held.e4m3:
        q[(q & 0x7F) == 0x7F] = 0x7E  # all but what is no number
    return QuantisedRows(q, scales, offsets, zeros)


def weight_of(
    rows: QuantisedRows,
    held: WeightFormat,
    dtype: torch.dtype = torch.bfloat16,
    order: torch.Tensor | None = None,
) -> QuantisedWeight:
    num_outputs, num_inputs = rows.q.shape
    weight = QuantisedWeight(
        num_outputs, num_inputs if order is None else int(order.max()) + 1, held, dtype, None, order
    )
    weight.put(0, rows)
    return weight


def exact_matrix(rows: QuantisedRows, held: WeightFormat) -> torch.Tensor:
    """In float64, by the formula of `WeightFormat`."""
    group = torch.arange(rows.q.shape[1]) // held.group_of(rows.q.shape[1])
    q = e4m3_values(rows.q) if held.e4m3 else rows.q.double()
    if rows.zeros is not None:
        q = q - rows.zeros.double()[:, group] + (128 if held.bits == 8 else 0)
    matrix = rows.scales.double()[:, group] * q
    return matrix if rows.offsets is None else matrix + rows.offsets.double()[:, group]


def e4m3_values(bits: torch.Tensor) -> torch.Tensor:
    """By the format's definition (arXiv 2209.05433, table 1), in float64."""
    code = bits.long() & 0xFF
    sign, exponent, mantissa = 1 - 2 * (code >> 7), code >> 3 & 15, (code & 7).double()
    return sign * torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def as_read(x: torch.Tensor, held: WeightFormat) -> torch.Tensor:
    """Rows as the product reads them, in float64: of so many inputs of a group integers, the largest 127."""
    if not held.integer_inputs:
        return x.double()
    groups = torch.split(x.float(), held.group_of(x.shape[1]), 1)
    parts = [part for group in groups for part in torch.split(group, held.input_group, 1)]
    read = []
    for part in parts:
        largest = part.abs().amax(1, keepdim=True)
        q = (part * torch.where(largest > 0, torch.tensor(127.0) / largest, 0)).round()
        read.append(q.double() * (largest / 127).double())
    return torch.cat(read, 1)


def assert_right(y: torch.Tensor, x: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor, spread: float) -> None:
    """spread: the largest magnitude that is added up for a weight, in units of its group's scale."""
    exact = F.linear(x.double(), matrix, bias.double())
    magnitudes = F.linear(x.double().abs(), torch.full_like(matrix, spread), bias.double().abs())
    bound = (x.shape[1] + 8) * 2.0**-24 * magnitudes + 2.0**-8 * exact.abs()
    assert ((y.double() - exact).abs() <= bound).all()


@needs_library
@settings(max_examples=60)
@given(
    st.sampled_from(FORMATS),
    st.one_of(st.integers(1, 30), st.sampled_from([64, 400])),
    st.one_of(st.integers(1, 100), st.sampled_from([576, 1536])),
    st.integers(1, 100),
    st.sampled_from(range(max(1, len(NAMES)))),
    st.integers(0, 99),
)
def test_products_are_those_of_float64_but_for_rounding(
    held: WeightFormat, num_rows: int, num_inputs: int, num_outputs: int, chosen: int, seed: int
) -> None:
    rows = random_rows(num_outputs, num_inputs, held, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=generator).bfloat16()
    bias = torch.randn(num_outputs, generator=generator).bfloat16()
    y = weight_of(rows, held).multiply(x, bias, chosen)
    # Scales are at most 1.1, offsets few above 3; four bits are added up as 128 more than they are.
    assert_right(y, as_read(x, held), exact_matrix(rows, held), bias, 1.1 * (448 if held.e4m3 else 256) + 4)


@settings(max_examples=30)
@given(
    st.sampled_from([held for held in FORMATS if held.integer_inputs]),
    st.integers(1, 30),
    st.one_of(st.integers(1, 100), st.sampled_from([576, 1536])),
    st.integers(1, 100),
    st.integers(0, 99),
)
def test_products_of_integers_in_float32_are_those_of_float64_but_for_rounding(
    held: WeightFormat, num_rows: int, num_inputs: int, num_outputs: int, seed: int
) -> None:
    rows = random_rows(num_outputs, num_inputs, held, seed)
    generator = torch.Generator().manual_seed(seed)
    x, bias = torch.randn(num_rows, num_inputs, generator=generator), torch.randn(num_outputs, generator=generator)
    weight = weight_of(rows, held, torch.float32)
    y = weight.multiply(x, bias)
    exact = F.linear(as_read(x, held), exact_matrix(rows, held), bias.double())
    assert ((y.double() - exact).abs() <= num_inputs * 2.0**-31 + 2.0**-24 * exact.abs()).all()
    assert torch.equal((weight.part(x) + bias).float(), y)


@needs_library
@pytest.mark.parametrize("held", FORMATS, ids=str)
@pytest.mark.parametrize("chosen", range(len(NAMES)), ids=NAMES)
def test_a_row_has_the_same_bits_alone_and_among_others_and_with_any_threads(held: WeightFormat, chosen: int) -> None:
    assert LIBRARY is not None
    weight = weight_of(random_rows(100, 520, held, 1), held)
    x = torch.randn(400, 520, generator=torch.Generator().manual_seed(2)).bfloat16()
    bias = torch.zeros(100, dtype=torch.bfloat16)
    alone = torch.cat([weight.multiply(row.unsqueeze(0), bias, chosen) for row in x[:40]])
    for num_rows in (2, 7, 12, 13, 40):
        assert torch.equal(weight.multiply(x[:num_rows], bias, chosen), alone[:num_rows]), num_rows
    whole = weight.multiply(x, bias, chosen)
    assert torch.equal(whole[:40], alone)
    LIBRARY.resize_pool(1)
    assert torch.equal(weight.multiply(x, bias, chosen), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("held", FORMATS, ids=str)
def test_a_product_by_some_outputs_is_that_part_of_the_whole(held: WeightFormat, dtype: torch.dtype) -> None:
    weight, outputs = QuantisedWeight(100, 256, held, dtype), slice(32, 90)
    weight.put(0, random_rows(100, 256, held, 1))
    x, bias = torch.randn(14, 256).to(dtype), torch.randn(100).to(dtype)
    whole = linear(x, weight, bias)[:, outputs]
    tolerance = 0.0 if weight.native else 1e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(linear(x, weight, bias[outputs], outputs), whole, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("held", FORMATS, ids=str)
def test_rows_come_back_as_what_they_stand_for(held: WeightFormat, dtype: torch.dtype) -> None:
    """Natively in bfloat16, by torch in float32; put in pieces, as a shard of a larger matrix."""
    rows = random_rows(70, 90, held, 3)
    weight = QuantisedWeight(70, 90, held, dtype)
    for first in (0, 40):
        part = slice(first, 40 if first == 0 else 70)
        weight.put(first, QuantisedRows(*(None if each is None else each[part] for each in rows)))  # type: ignore[arg-type]
    expected = dequantise(rows, held)
    assert torch.equal(expected.bfloat16(), exact_matrix(rows, held).bfloat16())
    assert torch.equal(weight[torch.tensor([69, 0, 41])], expected[[69, 0, 41]].to(dtype))
    taken = weight.held_rows(torch.tensor([99, 100, 169, 170]), 100)
    assert torch.equal(taken, torch.cat([torch.zeros(1, 90), expected[[0, 69]], torch.zeros(1, 90)]).to(dtype))


@needs_library
@settings(max_examples=20)
@given(
    st.sampled_from([held for held in FORMATS if held.group_size]),
    st.integers(1, 20),
    st.integers(1, 90),
    st.integers(0, 40),
    st.integers(0, 99),
)
def test_inputs_may_be_held_in_any_order_with_room_between(
    held: WeightFormat, num_rows: int, num_inputs: int, num_empty: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    places = torch.randperm(num_inputs + num_empty, generator=generator)
    order = torch.where(places < num_inputs, places, -1)
    rows = random_rows(40, len(order), held, seed)
    matrix = torch.zeros(40, num_inputs, dtype=torch.float64)
    matrix[:, order[order >= 0]] = exact_matrix(rows, held)[:, order >= 0]
    x = torch.randn(num_rows, num_inputs, generator=generator).bfloat16()
    bias = torch.zeros(40, dtype=torch.bfloat16)
    weight = weight_of(rows, held, order=order)
    in_order = torch.where(order >= 0, x[:, order], 0)
    y = weight.multiply(x, bias)
    assert_right(y, as_read(in_order, held), exact_matrix(rows, held), bias, 1.1 * (448 if held.e4m3 else 256) + 4)
    plain = weight_of(rows, held, torch.float32, order)
    for each in (weight, plain):
        assert torch.equal(each[torch.tensor([39, 5])].bfloat16(), matrix[[39, 5]].bfloat16())
    exact = F.linear(as_read(in_order, held), exact_matrix(rows, held))
    assert torch.allclose(plain.multiply(x.float(), None).double(), exact, rtol=1e-4, atol=0.02)


def test_without_native_products_the_result_is_that_of_the_matrix_it_stands_for() -> None:
    held = INT4
    rows = random_rows(50, 96, held, 4)
    x = torch.randn(3, 96)
    assert torch.equal(linear(x, weight_of(rows, held, torch.float32)), F.linear(x, dequantise(rows, held)))


@pytest.mark.parametrize("held", [INT8, INT4], ids=str)
def test_quantising_errs_by_half_a_step_at_most(held: WeightFormat) -> None:
    x = torch.randn(64, 200, generator=torch.Generator().manual_seed(5))
    x[3] = 0
    x[4, :32] = 0
    rows = quantise(x, held)
    error = (dequantise(rows, held) - x).abs()
    assert (error[3] == 0).all()
    assert held.bits == 8 or (error[4, :32] == 0).all()
    group = torch.arange(200) // held.group_of(200)
    step = rows.scales.float().abs()[:, group]
    low, high = (-127, 127) if held.bits == 8 else (0, 15)
    inside = (rows.q > low) & (rows.q < high)
    assert (error[inside] <= 0.5001 * step[inside]).all()
    assert inside.float().mean() > 0.85


def test_four_bits_err_less_in_the_chosen_range_than_in_the_whole_one() -> None:
    x = torch.randn(100, 320, generator=torch.Generator().manual_seed(6))
    groups = x.view(100, 10, 32)
    start, stop = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (stop - start) / 15
    whole = (((groups - start) / step).round() * step + start).view(100, 320)
    chosen = dequantise(quantise(x, INT4), INT4)
    assert (chosen - x).square().mean() < 0.97 * (whole - x).square().mean()


def test_what_four_bits_hold_already_is_kept() -> None:
    rows = random_rows(20, 320, INT4, 8)
    rows.q.view(20, 10, 32)[:, :, 0], rows.q.view(20, 10, 32)[:, :, 1] = 0, 15
    again = quantise(dequantise(rows, INT4), INT4)
    assert torch.equal(again.q, rows.q)


@needs_library
def test_weights_side_by_side_take_their_integers_and_scales_and_little_more() -> None:
    shapes = [(576, 576), (960, 576), (576, 1536)]
    for held in (INT8, INT4):
        weights = make_quantised(shapes, [held] * 3, torch.bfloat16)
        for weight, shape in zip(weights, shapes, strict=True):
            assert weight.shape == shape
            assert weight.nbytes <= 1.02 * held.num_bytes(*shape)


def test_what_does_not_fit_is_refused() -> None:
    held = INT4
    weight, rows = QuantisedWeight(32, 64, held), random_rows(32, 64, held, 7)
    for wrong in (
        rows._replace(offsets=None),
        rows._replace(q=rows.q[:, :32]),
        rows._replace(q=rows.q.float()),
        rows._replace(scales=rows.scales[:, :1]),
        rows._replace(scales=rows.scales.float()),
        rows._replace(offsets=rows.scales.float()),
    ):
        with pytest.raises(ValueError, match=r"do not fit|scales|offsets"):
            weight.put(0, wrong)
    with pytest.raises(ValueError, match="for a weight"):
        weight.multiply(torch.zeros(1, 63, dtype=torch.bfloat16), None)
