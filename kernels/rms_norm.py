"""`rms_norm`: y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.compiled import compilable
from phalanx.kernels.quantised_rows import quantise_rows


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., N], weight [N] of the same dtype -> [..., N] in that dtype. Normalised over the last dimension in
    float32, and rounded once.
    """
    code = native_cpu.code_of(x)
    if code is None:
        gpu = triton_gpu.operators_for(x)
        return _rms_norm(x, weight, eps) if gpu is None else gpu.rms_norm(x, weight, eps)
    width = x.shape[-1]
    x = x.contiguous()
    normed = torch.empty_like(x)
    native_cpu.LIBRARY.rms_norm(
        normed.data_ptr(), x.data_ptr(), width, weight.data_ptr(), eps, x.numel() // width, width, code
    )
    return normed


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual_sum): `rms_norm(x + residual, weight, eps)`, the sum rounded to the dtype first, and the sum.

    x, residual: [..., N] of one shape, weight [N], all of one dtype.
    """
    gpu = triton_gpu.operators_for(x)
    if gpu is not None:
        return gpu.add_rms_norm(x, residual, weight, eps)  # type: ignore[no-any-return]
    code = native_cpu.code_of(x)
    if code is None:
        return _add_rms_norm(x, residual, weight, eps)
    if not (x.is_contiguous() and residual.is_contiguous()):
        residual_sum = x + residual
        return rms_norm(residual_sum, weight, eps), residual_sum
    width = x.shape[-1]
    normed, residual_sum = torch.empty_like(x), torch.empty_like(x)
    native_cpu.LIBRARY.add_rms_norm(
        normed.data_ptr(),
        residual_sum.data_ptr(),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        eps,
        x.numel() // width,
        width,
        code,
    )
    return normed, residual_sum


def rms_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale): `rms_norm` in float32, and its rows by `quantise_rows`, not rounded between."""
    gpu = triton_gpu.narrowing_operators_for(x, dtype)
    if gpu is not None:
        return gpu.rms_norm_quantised(x, weight, eps, dtype)  # type: ignore[no-any-return]
    return quantise_rows(F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps), dtype)


def add_rms_norm_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, scale, residual_sum): `rms_norm_quantised` of the sum rounded to x's dtype, and the sum."""
    gpu = triton_gpu.narrowing_operators_for(x, dtype)
    if gpu is not None:
        return gpu.add_rms_norm_quantised(x, residual, weight, eps, dtype)  # type: ignore[no-any-return]
    residual_sum = x + residual
    return *rms_norm_quantised(residual_sum, weight, eps, dtype), residual_sum


@compilable
def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


@compilable
def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual_sum = x + residual
    return F.rms_norm(residual_sum, (x.shape[-1],), weight, eps), residual_sum
