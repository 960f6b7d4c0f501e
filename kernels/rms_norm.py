"""`rms_norm`: y = w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., N], weight [N] of the same dtype -> [..., N] in that dtype. Normalised over the last dimension in
    float32.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
