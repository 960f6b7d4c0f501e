"""`layer_norm`: y = w * (x - mean(x)) / sqrt(var(x) + eps) + b (Ba et al. 2016, arXiv 1607.06450)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels import triton_gpu
from phalanx.kernels.compiled import compilable
from phalanx.kernels.quantised_rows import quantise_rows


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x [..., N], weight and bias [N] of the same dtype -> [..., N] in that dtype. Over the last dimension, in float32,
    and rounded once.
    """
    gpu = triton_gpu.operators_for(x)
    if gpu is not None:
        return gpu.layer_norm(x, weight, bias, eps)  # type: ignore[no-any-return]
    return _layer_norm(x, weight, bias, eps)


def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual_sum): `layer_norm(x + residual, ...)`, the sum rounded to the dtype first, and the sum."""
    gpu = triton_gpu.operators_for(x)
    if gpu is not None:
        return gpu.add_layer_norm(x, residual, weight, bias, eps)  # type: ignore[no-any-return]
    return _add_layer_norm(x, residual, weight, bias, eps)


def layer_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale): `layer_norm` in float32, and its rows by `quantise_rows`, not rounded between."""
    gpu = triton_gpu.narrowing_operators_for(x, dtype)
    if gpu is not None:
        return gpu.layer_norm_quantised(x, weight, bias, eps, dtype)  # type: ignore[no-any-return]
    wide_bias = None if bias is None else bias.float()
    return quantise_rows(F.layer_norm(x.float(), (x.shape[-1],), weight.float(), wide_bias, eps), dtype)


def add_layer_norm_quantised(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(q, scale, residual_sum): `layer_norm_quantised` of the sum rounded to x's dtype, and the sum."""
    gpu = triton_gpu.narrowing_operators_for(x, dtype)
    if gpu is not None:
        return gpu.add_layer_norm_quantised(x, residual, weight, bias, eps, dtype)  # type: ignore[no-any-return]
    residual_sum = x + residual
    return *layer_norm_quantised(residual_sum, weight, bias, eps, dtype), residual_sum


@compilable
def _layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


@compilable
def _add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    residual_sum = x + residual
    return F.layer_norm(residual_sum, (x.shape[-1],), weight, bias, eps), residual_sum
