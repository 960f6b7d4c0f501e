"""`silu_mul`: y = silu(gate) * up, the gate of SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 F], the gate in the first F columns -> [T, F] in the same dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
