"""Cosines and sines against float64, to the rounding of their dtype."""

from __future__ import annotations

import pytest
import torch

from phalanx.kernels import native_cpu, rope_frequencies, rope_table


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 2e-7), (torch.bfloat16, 2**-9 + 1e-6), (torch.float16, 2**-12 + 1e-6)]
)
def test_cosines_and_sines(native: bool, dtype: torch.dtype, rounding: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        monkeypatch.setattr(native_cpu, "LIBRARY", None)
    positions = torch.cat((torch.arange(70), torch.tensor([4095, 131071])))
    frequencies = rope_frequencies(24, 10000.0)
    angles = (positions.float()[:, None] * frequencies).double()  # an angle is a float32, as models were trained with
    cos, sin = rope_table(positions, frequencies, dtype)
    for found, exact in ((cos, angles.cos()), (sin, angles.sin())):
        assert found.shape == (len(positions), 1, 24)
        assert found.dtype == dtype
        for half in (found[:, 0, :12], found[:, 0, 12:]):
            assert (half.double() - exact).abs().max() <= rounding
