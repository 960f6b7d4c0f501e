"""Rows as integers with zeros, and as FP8 numbers, and what the importance of inputs does."""

from __future__ import annotations

import pytest
import torch

from phalanx.kernels import WeightFormat, dequantise, quantise

ZEROS = WeightFormat(4, 32, torch.float32, zeros=True)
E4M3 = WeightFormat(8, None, torch.float32, e4m3=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("zero", [0, 6, 15])
def test_numbers_on_a_grid_with_a_zero_are_found_again(zero: int) -> None:
    """zero: at the ends none of a group's weights is negative, or positive."""
    steps = torch.arange(16).repeat(2)[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    rows = ((steps - zero) * 0.125).repeat(3, 2)
    found = quantise(rows, ZEROS)
    assert torch.equal(dequantise(found, ZEROS), rows)
    assert found.zeros is not None
    assert (found.zeros == zero).all()


def test_ranges_without_zero_are_widened_to_it() -> None:
    rows = random(4, 64).abs() + 1
    found = quantise(rows, ZEROS)
    step = rows.view(4, 2, 32).amax(-1).repeat_interleave(32, 1) / 15
    assert ((dequantise(found, ZEROS) - rows).abs() <= 3 * step).all()  # of the largest a part may be cut off
    assert (quantise(torch.zeros(1, 32), ZEROS).q == 0).all()


def test_fp8_numbers_are_those_nearest_to_the_scaled_rows() -> None:
    rows = random(5, 40)
    found = quantise(rows, E4M3)
    torch.testing.assert_close(found.scales, rows.abs().amax(1, keepdim=True) / 448)
    exact = (rows / found.scales).double()
    error = (found.q.view(torch.float8_e4m3fn).double() - exact).abs()
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, torch.tensor(2.0**-10))).all()


def test_a_range_is_cut_where_the_inputs_that_matter_err_least() -> None:
    rows = random(64, 96, seed=2)
    importance = random(96, seed=3).square() ** 3

    def error(found: torch.Tensor) -> float:
        return float(((found - rows).square() * importance).sum())

    alike, weighed = (dequantise(quantise(rows, ZEROS, each), ZEROS) for each in (None, importance))
    assert error(weighed) < 0.98 * error(alike)
    assert torch.equal(dequantise(quantise(rows, ZEROS, torch.ones(96)), ZEROS), alike)
