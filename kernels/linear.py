"""`linear`: y = x W^T + b."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [T, in], weight [out, in], bias [out] or None, all of one floating dtype -> [T, out]."""
    return F.linear(x, weight, bias)
