"""`linear`: y = x W^T + b."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels.packed import PackedWeight, Weight

# Of float32 on CPUs torch reads weights at 5 to 12 GB/s for so many rows, and at 11 to 31 with the product turned round
# (two Zen 4 cores, 960x576 to 49152x576). For one row, and from eight on, one is as fast as the other.
FEW_ROWS = range(2, 5)


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in], weight [out, in], bias [out] or None, all of one floating dtype -> [T, out].

    By a packed weight a row's result does not depend on the other rows, nor on the number of threads. It is rounded
    once; subnormal numbers count as zero.
    """
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, bias)
    if x.is_cpu and x.dtype == torch.float32 and len(x) in FEW_ROWS:
        y = torch.mm(weight, x.t()).t().contiguous()
        return y if bias is None else y.add_(bias)
    return F.linear(x, weight, bias)
