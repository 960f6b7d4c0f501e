"""Rows in a byte a value: how far what comes back is from what was sent, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.comm.compress import SCHEMES, Packing, Rows

EPS = {
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}  # half a unit in the last place, at most


def bound(x: torch.Tensor, scheme: str) -> torch.Tensor:
    """What a value of `x` [rows, width] may be off by, in float64, before the last rounding."""
    largest = x.abs().amax(1, keepdim=True)
    if scheme == "int8":
        return (largest / 254).expand_as(x)
    return torch.maximum(x.abs() / 17, largest / 448 / 1024)


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(sorted(SCHEMES)),
    dtype=st.sampled_from(sorted(EPS, key=str)),
    size=st.floats(-4, 4),
    outlier=st.floats(0, 4),
    seed=st.integers(0, 1000),
)
def test_no_value_is_off_by_more_than_the_bound_of_its_token(
    scheme: str, dtype: torch.dtype, size: float, outlier: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 97, generator=generator) * 10**size
    x[:, 5] *= 10**outlier
    x = x.to(dtype).nan_to_num(posinf=0.0, neginf=0.0)
    exact = x.double()
    allowed = bound(exact, scheme)
    # The scale, the quotient and the product are each rounded in float32 too.
    allowed = allowed + 2.0**-21 * (exact.abs() + allowed)
    if dtype == torch.float16:
        allowed = allowed + 2.0**-25  # half of its smallest number
    allowed = allowed + EPS[dtype] * (exact.abs() + allowed)
    assert ((Rows.of(x, scheme).decode(dtype).double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_bound_is_nearly_reached(scheme: str) -> None:
    """Or it would say little."""
    x = torch.randn(20, 4096, generator=torch.Generator().manual_seed(0)).double()
    off = (Rows.of(x.float(), scheme).decode(torch.float32).double() - x).abs()
    assert (off / bound(x, scheme)).max() > 0.95


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_the_largest_value_of_a_token_and_zeros_come_back_as_they_were(scheme: str) -> None:
    x = torch.tensor([[3.5, 0.0, -7.0], [0.0, 0.0, 0.0], [1e-30, -3e-30, 0.0]], dtype=torch.bfloat16)
    got = Rows.of(x, scheme).decode(x.dtype)
    assert got[0, 1:].tolist() == [0.0, -7.0]
    assert got[1].tolist() == [0.0] * 3
    assert got[2, 1] == x[2, 1]


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_token_that_is_not_finite_comes_back_without_a_finite_value_and_leaves_the_others_alone(
    scheme: str, bad: float
) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = bad
    got = Rows.of(x, scheme).decode(x.dtype)
    assert got[0].tolist() == [1.0] * 4
    assert not got[1].isfinite().any()


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(SCHEMES)), st.integers(1, 9), st.integers(1, 7))
def test_any_part_of_the_rows_comes_back_from_a_message_as_from_the_whole(
    data: st.DataObject, scheme: str, num_rows: int, width: int
) -> None:
    x = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(width))
    start = data.draw(st.integers(0, num_rows * width - 1))
    stop = data.draw(st.integers(start + 1, num_rows * width))
    packing = Packing(start, stop, width, scheme)
    first_row = data.draw(st.integers(0, packing.rows.start))
    message = packing.pack(Rows.of(x[first_row:], scheme), first_row)
    assert (message.dtype, len(message)) == (torch.uint8, packing.num_bytes)
    expected = Rows.of(x, scheme).decode(x.dtype).view(-1)[start:stop]
    assert torch.equal(packing.unpack(message, x.dtype), expected)
