"""Each operator against a float64 computation written out from its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phalanx.kernels import (
    gumbel_noise,
    linear,
    rms_norm,
    rope,
    rope_frequencies,
    rope_table,
    silu_mul,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
dtypes = st.sampled_from(list(TOLERANCE))


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    tolerance = TOLERANCE[actual.dtype]
    return torch.allclose(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@given(st.integers(1, 7), st.integers(1, 130), dtypes)
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(width).to(dtype)
    exact = x.double()
    expected = weight.double() * exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert close(rms_norm(x, weight, 1e-5), expected)


@given(st.integers(1, 7), st.integers(1, 65), dtypes)
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 2 * width).to(dtype)
    gate, up = x[:, :width].double(), x[:, width:].double()
    assert close(silu_mul(x), gate / (1 + (-gate).exp()) * up)


@given(st.integers(1, 5), st.integers(1, 33), st.integers(1, 33), st.booleans())
def test_linear(rows: int, inputs: int, outputs: int, biased: bool) -> None:
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    bias = torch.randn(outputs) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert close(linear(x, weight, bias), expected)


def test_rope_turns_pairs_of_halves_by_position_times_frequency() -> None:
    head_dim, positions = 8, torch.tensor([0, 3, 1000])
    x = torch.randn(3, 2, head_dim)
    frequencies = rope_frequencies(head_dim, 10000.0)
    rotated = rope(x, *rope_table(positions, frequencies, torch.float32))
    for token, position in enumerate(positions.tolist()):
        for pair in range(head_dim // 2):
            angle = position * 10000.0 ** (-2 * pair / head_dim)
            low, high = x[token, :, pair].double(), x[token, :, pair + head_dim // 2].double()
            assert torch.allclose(
                rotated[token, :, pair].double(), low * math.cos(angle) - high * math.sin(angle), atol=1e-4
            )
            assert torch.allclose(
                rotated[token, :, pair + head_dim // 2].double(),
                high * math.cos(angle) + low * math.sin(angle),
                atol=1e-4,
            )


def test_llama3_scaling_divides_long_waves_and_keeps_short_ones() -> None:
    plain = rope_frequencies(128, 500000.0)
    scaled = rope_frequencies(
        128, 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    wavelength = 2 * math.pi / plain
    assert torch.equal(scaled[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    assert torch.allclose(scaled[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()


def test_gumbel_noise_has_the_distribution_it_names() -> None:
    """Mean (Euler's constant), variance (pi^2 / 6) and quartiles, over many keys."""
    noise = gumbel_noise(torch.arange(40).unsqueeze(1), torch.full((40, 1), 7), torch.arange(5000)).flatten()
    assert abs(noise.mean().item() - 0.5772) < 0.02
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.05
    for quantile in (0.25, 0.5, 0.75, 0.99):
        expected = -math.log(-math.log(quantile))
        assert abs((noise < expected).double().mean().item() - quantile) < 0.01


@pytest.mark.parametrize("changed", ["seed", "position", "token"])
def test_gumbel_noise_depends_on_its_key_alone(changed: str) -> None:
    one, tokens = torch.ones(1, 1, dtype=torch.int64), torch.arange(100)
    noise = gumbel_noise(one, one, tokens)
    assert torch.equal(gumbel_noise(one, one, tokens[40:60]), noise[:, 40:60])
    other = {
        "seed": gumbel_noise(one * 2, one, tokens),
        "position": gumbel_noise(one, one * 2, tokens),
        "token": gumbel_noise(one, one, tokens + 100),
    }[changed]
    correlation = torch.corrcoef(torch.cat((noise, other)))[0, 1].item()
    assert abs(correlation) < 0.4
