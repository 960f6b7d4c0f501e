"""When the operators of GPUs are taken, and that nothing stays of their interpretation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from phalanx.kernels import rms_norm, triton_gpu


def test_the_kernels_load_no_triton_before_a_gpu_is_used() -> None:
    program = (
        "import sys, torch; from phalanx import kernels; "
        "kernels.rms_norm(torch.randn(2, 4), torch.randn(4), 1e-6); assert 'triton' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_triton_pytorch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(triton_gpu, "DEVICE_TYPE", "meta")
    monkeypatch.setattr(triton_gpu, "_found", None)
    x = torch.empty(2, 4, device="meta")
    assert triton_gpu.operators_for(x) is None
    assert rms_norm(x, x[0], 1e-6).shape == x.shape
    assert "pip install triton" in triton_gpu.find_triton().told


def test_nothing_of_the_interpreter_stays() -> None:
    tl = pytest.importorskip("triton.language", reason="needs Triton")
    from tests.kernels.gpu.interpreter import interpreted

    from phalanx.kernels import gpu

    places = [tl, tl.core, tl.math, tl.standard, tl.tensor, tl.dtype, sys.modules[gpu.rms_norm.__module__]]
    x = torch.randn(3, 64)
    with interpreted():  # what it adds to the modules of kernels, for ever, is names of its own
        gpu.rms_norm(x, x[0], 1e-5)
    before = [dict(vars(place)) for place in places]
    with interpreted():
        gpu.rms_norm(x, x[0], 1e-5)
    assert [dict(vars(place)) for place in places] == before
    assert triton_gpu.operators_for(x) is None


def test_a_tensor_on_no_gpu_is_told_so() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from phalanx.kernels.gpu.target import target_of

    with pytest.raises(RuntimeError, match="move it to a CUDA device"):
        target_of(torch.zeros(1))
