"""`layer_norm`: y = w * (x - mean(x)) / sqrt(var(x) + eps) + b (Ba et al. 2016, arXiv 1607.06450)."""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.row_norm import row_norm


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


@operator(fake=_fake)
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """As `phalanx.kernels.layer_norm`, which calls it; so for the others."""
    return row_norm(x, None, weight, bias, eps, centred=True).out


def _fake_add(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@operator(fake=_fake_add)
def add_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = row_norm(x, residual, weight, bias, eps, centred=True)
    assert normed.sums is not None
    return normed.out, normed.sums


def _fake_quantised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape[:-1], dtype=torch.float32)


@operator(fake=_fake_quantised)
def layer_norm_quantised(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    normed = row_norm(x, None, weight, bias, eps, dtype=dtype, centred=True)
    assert normed.scales is not None
    return normed.out, normed.scales


def _fake_add_quantised(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_fake_quantised(x, weight, bias, eps, dtype), x.new_empty(x.shape)


@operator(fake=_fake_add_quantised)
def add_layer_norm_quantised(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    normed = row_norm(x, residual, weight, bias, eps, dtype=dtype, centred=True)
    assert normed.scales is not None
    assert normed.sums is not None
    return normed.out, normed.scales, normed.sums


def _inputs(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return meta(rows, width), meta(rows, width), meta(width), meta(width)


EXAMPLES = (
    Example("bf16 4096", lambda: layer_norm(meta(32, 4096), meta(4096), meta(4096), 1e-5)),
    Example("bf16 16384, residual", lambda: add_layer_norm(*_inputs(8, 16384), 1e-5)),
    Example("bf16 18432, residual", lambda: add_layer_norm(*_inputs(8, 18432), 1e-5)),
    Example("int8 4096, residual", lambda: add_layer_norm_quantised(*_inputs(32, 4096), 1e-5, torch.int8)),
    Example(
        "fp8 8192, residual",
        lambda: add_layer_norm_quantised(*_inputs(32, 8192), 1e-5, torch.float8_e4m3fn),
        archs=(90,),
    ),
)
