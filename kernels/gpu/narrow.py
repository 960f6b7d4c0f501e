"""Parts of kernels that are shared: rows written as 8-bit numbers with a scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.target import target_of


@triton.jit
def rounded(values):
    """To whole numbers, halves to even: of |values| < 2^22, where float32 has room for nothing behind the point."""
    shift = 12582912.0  # 1.5 * 2^23
    return (values + shift) - shift


@triton.jit
def narrowed(values, inverse, LIMIT: tl.constexpr, WHOLE: tl.constexpr, dtype: tl.constexpr):
    """values * inverse as numbers of an 8-bit dtype, whole ones or floats."""
    q = tl.minimum(tl.maximum(values * inverse, -LIMIT), LIMIT)
    return rounded(q).to(dtype) if WHOLE else q.to(dtype)


def narrows_on(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the GPU of `x` has instructions to round to `dtype`: for 8-bit floats from compute capability 8.9 on."""
    return dtype == torch.int8 or target_of(x).arch >= 89
