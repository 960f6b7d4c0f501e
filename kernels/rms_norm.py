"""`rms_norm`: y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels import native_cpu


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., N], weight [N] of the same dtype -> [..., N] in that dtype. Normalised over the last dimension in
    float32, and rounded once.
    """
    code = native_cpu.code_of(x)
    if code is None:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
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
    code = native_cpu.code_of(x)
    if code is None or not (x.is_contiguous() and residual.is_contiguous()):
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
