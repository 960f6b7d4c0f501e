"""`rms_norm`: y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.row_norm import row_norm


def _fake(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator(fake=_fake)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `phalanx.kernels.rms_norm`, which calls it; so for the others."""
    return row_norm(x, None, weight, None, eps).out


def _fake_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@operator(fake=_fake_add)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = row_norm(x, residual, weight, None, eps)
    assert normed.sums is not None
    return normed.out, normed.sums


def _fake_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator(fake=_fake_quantised)
def rms_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = row_norm(x, None, weight, None, eps, dtype=dtype)
    assert normed.scales is not None
    return normed.out, normed.scales


def _fake_add_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake_quantised(x, weight, eps, dtype), x.new_empty(x.shape)


@operator(fake=_fake_add_quantised)
def add_rms_norm_quantised(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed = row_norm(x, residual, weight, None, eps, dtype=dtype)
    assert normed.scales is not None
    assert normed.sums is not None
    return normed.out, normed.scales, normed.sums


EXAMPLES = (
    Example("bf16 4096", lambda: rms_norm(meta(32, 4096), meta(4096), 1e-6)),
    Example("bf16 heads of 128", lambda: rms_norm(meta(256, 32, 128), meta(128), 1e-6)),
    Example("bf16 16384, residual", lambda: add_rms_norm(meta(8, 16384), meta(8, 16384), meta(16384), 1e-6)),
    Example("bf16 18432, residual", lambda: add_rms_norm(meta(8, 18432), meta(8, 18432), meta(18432), 1e-6)),
    Example("int8 4096", lambda: rms_norm_quantised(meta(32, 4096), meta(4096), 1e-6, torch.int8)),
    Example(
        "fp8 8192, residual",
        lambda: add_rms_norm_quantised(meta(32, 8192), meta(32, 8192), meta(8192), 1e-6, torch.float8_e4m3fn),
        archs=(90,),
    ),
    Example(
        "fp8 18432, residual",
        lambda: add_rms_norm_quantised(meta(8, 18432), meta(8, 18432), meta(18432), 1e-6, torch.float8_e4m3fn),
        archs=(90,),
    ),
)
