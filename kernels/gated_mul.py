"""`silu_mul`, `gelu_mul`: y = activation(gate) * up, the gates of SwiGLU and GeGLU (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.compiled import compilable
from phalanx.kernels.quantised_rows import quantise_rows


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 F], the gate in the first F columns -> silu(gate) * up, [T, F] in the same dtype."""
    code = native_cpu.code_of(gate_up)
    if code is None:
        gpu = triton_gpu.operators_for(gate_up)
        if gpu is not None:
            return gpu.silu_mul(gate_up)  # type: ignore[no-any-return]
        return _silu_mul(gate_up)
    return _native(gate_up, False, code)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """The same with GELU in its approximation by tanh (Hendrycks and Gimpel 2016, arXiv 1606.08415)."""
    code = native_cpu.code_of(gate_up)
    if code is None:
        gpu = triton_gpu.operators_for(gate_up)
        if gpu is not None:
            return gpu.gelu_mul(gate_up)  # type: ignore[no-any-return]
        return _gelu_mul(gate_up)
    return _native(gate_up, True, code)


def silu_mul_quantised(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale): `silu_mul` in float32, and its rows by `quantise_rows`, not rounded between."""
    gpu = triton_gpu.narrowing_operators_for(gate_up, dtype)
    if gpu is not None:
        return gpu.silu_mul_quantised(gate_up, dtype)  # type: ignore[no-any-return]
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantise_rows(F.silu(gate) * up, dtype)


def gelu_mul_quantised(gate_up: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of `gelu_mul`."""
    gpu = triton_gpu.narrowing_operators_for(gate_up, dtype)
    if gpu is not None:
        return gpu.gelu_mul_quantised(gate_up, dtype)  # type: ignore[no-any-return]
    gate, up = gate_up.float().chunk(2, dim=-1)
    return quantise_rows(F.gelu(gate, approximate="tanh") * up, dtype)


def _native(gate_up: torch.Tensor, gelu: bool, code: int) -> torch.Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty((num_rows, width))
    native_cpu.LIBRARY.gated_mul(out.data_ptr(), gate_up.data_ptr(), num_rows, width, gelu, code)
    return out


@compilable
def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@compilable
def _gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
