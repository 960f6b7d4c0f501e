"""`sample` in Triton draws what its reference draws, and what the engine's sampler draws."""

from __future__ import annotations

import math
import sys
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.kernels.gpu.poison import poisoned

from phalanx.comm.group import GroupSpec
from phalanx.comm.single import SingleCommunicator
from phalanx.engine.messages import Sampling
from phalanx.engine.sampler import Sampler
from phalanx.kernels import SamplingRows, sample, triton_gpu
from phalanx.parallel.split import Split

row_settings = st.tuples(
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.sampled_from([0, 0, 1, 5, 20, 10000]),
    st.sampled_from([1.0, 1.0, 0.95, 0.7, 0.2, 1e-9]),
    st.sampled_from([0.0, 0.0, 0.05, 0.9]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 2**20),
)


def rows_of(settings_of_rows: list[tuple[float, int, float, float, int, int]], device: torch.device) -> SamplingRows:
    dtypes = (torch.float64, torch.int64, torch.float64, torch.float64, torch.int64, torch.int64)
    columns = zip(*settings_of_rows, strict=True)
    return SamplingRows(
        *(torch.tensor(column, dtype=dtype, device=device) for column, dtype in zip(columns, dtypes, strict=True))
    )


@example([(1.0, 0, 0.99, 0.0, 3, 4), (0.7, 60, 0.9, 0.01, 5, 6)], 1500, 7)
@given(st.lists(row_settings, min_size=1, max_size=3), st.sampled_from([1, 7, 300, 1500]), st.integers(0, 2**30))
@settings(max_examples=6)
def test_it_draws_as_its_reference(
    device: torch.device, given_rows: list[tuple[float, int, float, float, int, int]], width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(len(given_rows), width + 2, generator=generator))[:, :width].to(device)
    logits[:, width // 2 : width // 2 + width // 4] = -math.inf
    rows = rows_of(given_rows, device)
    module = sys.modules["phalanx.kernels.gpu.sample"]
    with patch.object(module, "FIRST", 16), patch.object(module, "_BLOCK", 2048), poisoned():
        drawn = sample(logits, rows)
    with patch.object(triton_gpu, "DEVICE_TYPE", "none"):
        expected = sample(logits, rows)
    assert drawn.tolist() == expected.tolist()


def test_the_engine_draws_the_same(device: torch.device) -> None:
    width = 700
    given_rows = [
        (temperature, top_k, top_p, min_p, 11 * number, 5)
        for number, (temperature, top_k, top_p, min_p) in enumerate(
            [(0.0, 0, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.8, 40, 1.0, 0.0), (1.5, 0, 0.9, 0.0), (1.0, 50, 0.8, 0.01)]
        )
    ]
    logits = 3 * torch.randn(len(given_rows), width, device=device)
    sampler = Sampler(Split.even(width, 1), SingleCommunicator(GroupSpec(0, 1, device=str(device))))
    for slot, (temperature, top_k, top_p, min_p, seed, _) in enumerate(given_rows):
        sampler.admit(slot, Sampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))
    slots, positions = range(len(given_rows)), [5] * len(given_rows)
    drawn = sampler.sample(logits.clone(), slots, positions).tokens
    with patch.object(triton_gpu, "DEVICE_TYPE", "none"):
        expected = sampler.sample(logits.clone(), slots, positions).tokens
    assert drawn.tolist() == expected.tolist() == sample(logits, rows_of(given_rows, device)).tolist()


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8)])
def test_draws_follow_the_distribution(top_k: int, top_p: float, device: torch.device) -> None:
    """Over many positions, as often as the softmax of what is left says."""
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    draws = 2000
    logits = probabilities.log().float().expand(draws, -1).contiguous().to(device)
    rows = rows_of([(1.0, top_k, top_p, 0.0, 3, position) for position in range(draws)], device)
    with patch.object(triton_gpu, "DEVICE_TYPE", "none"):
        counted = sample(logits, rows).bincount(minlength=5).double().cpu() / draws
    kept = 3 if top_k or top_p < 1 else 5
    expected = torch.where(torch.arange(5) < kept, probabilities, 0.0)
    torch.testing.assert_close(counted, expected / expected.sum(), rtol=0, atol=0.04)


def test_it_is_registered(device: torch.device) -> None:
    rows = rows_of([(1.0, 3, 0.9, 0.1, 7, 9), (0.0, 0, 1.0, 0.0, 1, 2)], device)
    torch.library.opcheck(torch.ops.phalanx.sample.default, (torch.randn(2, 40, device=device), *rows))
