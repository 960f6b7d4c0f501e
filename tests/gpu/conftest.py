"""Tests that need an NVIDIA GPU. They need neither Ray nor more than one GPU."""

from __future__ import annotations

import pytest
import torch

from phalanx.comm.nccl_binding import NcclBinding
from phalanx.comm.nccl_cupy import find_cupy


@pytest.fixture(autouse=True)
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture
def binding() -> NcclBinding:
    found = find_cupy()
    if found.binding is None:
        pytest.skip(f"needs NCCL through CuPy: {found.told}")
    return found.binding
