"""Activations in 8 bits, as norms and gates give them to products by quantised weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch

from phalanx.kernels.gated_mul import silu_mul, silu_mul_quantised
from phalanx.kernels.rms_norm import add_rms_norm, add_rms_norm_quantised, rms_norm, rms_norm_quantised


@dataclass(frozen=True, slots=True)
class QuantisedActivations:
    """q [T, K] of int8 or float8_e4m3fn, scales [T] float32: rows as `quantise_rows` has them."""

    q: torch.Tensor
    scales: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        return self.q.shape

    def __len__(self) -> int:
        return len(self.q)

    def tensor_split(self, num_parts: int) -> tuple[QuantisedActivations, ...]:
        """As torch's, over the rows."""
        return tuple(map(QuantisedActivations, self.q.tensor_split(num_parts), self.scales.tensor_split(num_parts)))


Activations: TypeAlias = torch.Tensor | QuantisedActivations
"""Rows [T, K] that are multiplied by weights; in 8 bits by those alone that take them so (`QuantisedWeight.takes`)."""


@dataclass(frozen=True, slots=True)
class QuantisingNorm:
    """An RMSNorm by `weight` [N] whose rows are given on in 8 bits, as `dtype`."""

    weight: torch.Tensor
    dtype: torch.dtype


Norm: TypeAlias = torch.Tensor | QuantisingNorm
"""An RMSNorm, by its weight [N]."""


def plain_norm(norm: Norm) -> torch.Tensor:
    """Its weight, for what does not quantise."""
    return norm.weight if isinstance(norm, QuantisingNorm) else norm


def normed(x: torch.Tensor, norm: Norm, eps: float) -> Activations:
    """As `rms_norm`."""
    if isinstance(norm, QuantisingNorm):
        return QuantisedActivations(*rms_norm_quantised(x, norm.weight, eps, norm.dtype))
    return rms_norm(x, norm, eps)


def add_normed(x: torch.Tensor, residual: torch.Tensor, norm: Norm, eps: float) -> tuple[Activations, torch.Tensor]:
    """As `add_rms_norm`."""
    if isinstance(norm, QuantisingNorm):
        q, scales, total = add_rms_norm_quantised(x, residual, norm.weight, eps, norm.dtype)
        return QuantisedActivations(q, scales), total
    return add_rms_norm(x, residual, norm, eps)


def silu_gated(gate_up: torch.Tensor, dtype: torch.dtype | None) -> Activations:
    """As `silu_mul`; dtype: of 8 bits, or None for that of `gate_up`."""
    return silu_mul(gate_up) if dtype is None else QuantisedActivations(*silu_mul_quantised(gate_up, dtype))
