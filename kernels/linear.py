"""`linear`: y = x W^T + b, and the forms in which something follows it at once."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from phalanx.kernels import triton_gpu, watch
from phalanx.kernels.activations import Activations, QuantisedActivations
from phalanx.kernels.gated_mul import gelu_mul, silu_mul
from phalanx.kernels.packed import PackedWeight, Weight
from phalanx.kernels.quantised_weight import QuantisedWeight

# Of float32 on CPUs torch reads weights at 5 to 12 GB/s for so many rows, and at 11 to 31 with the product turned round
# (two Zen 4 cores, 960x576 to 49152x576). For one row, and from eight on, one is as fast as the other.
FEW_ROWS = range(2, 5)


def linear(
    x: Activations, weight: Weight, bias: torch.Tensor | None = None, outputs: slice | None = None
) -> torch.Tensor:
    """x [T, in], weight [out, in], bias [out] or None, all of one floating dtype -> [T, out]. x may be quantised to
    what a `QuantisedWeight` takes. outputs: the rows of the weight to multiply by, from a multiple of `BLOCK` on, which
    `out` then counts; None for all.

    By a packed weight a row's result does not depend on the other rows, nor on the number of threads. It is rounded
    once; subnormal numbers count as zero.
    """
    if isinstance(weight, QuantisedWeight):
        return weight.multiply(x, bias, outputs=outputs)
    if isinstance(x, QuantisedActivations):
        raise TypeError(f"activations in {x.q.dtype} were given to a weight that is not quantised")
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, bias, outputs=outputs)
    if outputs is not None:
        weight = weight[outputs]
    gpu = triton_gpu.operators_for(x)
    if gpu is not None:
        return gpu.linear(x, weight, bias)  # type: ignore[no-any-return]
    if watch.current is not None:
        return watch.watched(partial(watch.product_work, "linear", 1.0), _by_torch, x, weight, bias)
    return _by_torch(x, weight, bias)


def linear_part(x: Activations, weight: Weight) -> torch.Tensor:
    """`linear(x, weight)` of some of the inputs, [T, out], to be added up with that of the others. In float64 where
    that makes the sum the same for any cut of the inputs, else in x's dtype.
    """
    return weight.part(x) if isinstance(weight, QuantisedWeight) else linear(x, weight)


def _by_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.is_cpu and x.dtype == torch.float32 and len(x) in FEW_ROWS:
        y = torch.mm(weight, x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)


def linear_add(
    x: torch.Tensor, weight: Weight, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`linear(x, weight, bias) + residual`, residual [T, out]; on a GPU what lies between need not be rounded."""
    gpu = triton_gpu.operators_for(x)
    if gpu is not None and isinstance(weight, torch.Tensor):
        return gpu.linear_add(x, weight, residual, bias)  # type: ignore[no-any-return]
    return linear(x, weight, bias) + residual


def gated_linear(
    x: Activations, weight: Weight, activation: Literal["silu", "gelu"], bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`silu_mul(linear(x, weight, bias))`, or `gelu_mul`: the first half of the weight's rows are the gates. On a GPU
    what lies between need not be rounded.
    """
    if isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor):
        gpu = triton_gpu.operators_for(x)
        if gpu is not None:
            return gpu.gated_linear(x, weight, activation, bias)  # type: ignore[no-any-return]
    return (silu_mul if activation == "silu" else gelu_mul)(linear(x, weight, bias))
