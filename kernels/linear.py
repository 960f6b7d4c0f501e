"""`linear`: y = x W^T + b."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels.packed import PackedWeight, Weight


def linear(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in], weight [out, in], bias [out] or None, all of one floating dtype -> [T, out].

    By a packed weight a row's result does not depend on the other rows, nor on the number of threads. It is rounded
    once; subnormal numbers count as zero.
    """
    if isinstance(weight, PackedWeight):
        return weight.multiply(x, bias)
    return F.linear(x, weight, bias)
