"""Kernels for GPUs: on one where there is one, else interpreted on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from phalanx.kernels.triton_gpu import find_triton


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _runs_kernels(device: torch.device) -> Iterator[None]:
    found = find_triton()
    if found.operators is None:
        pytest.skip(f"needs Triton, which has no build for this platform or is not installed: {found.told}")
    if device.type == "cuda":
        yield
        return
    from tests.kernels.gpu.interpreter import interpreted

    with interpreted():
        yield
