"""`quantise_rows`: rows in 8 bits, each with a scale of its own, as the operators called `..._quantised` give them.

q = round(x * limit / amax), scale = amax / limit, so that x is nearly q * scale: per-token quantisation, as SmoothQuant
(Xiao et al. 2022, arXiv 2211.10438) does it to int8.
"""

from __future__ import annotations

import torch

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of a format that rows are quantised to."""

LEAST = 1e-30
"""The smallest amax that counts: a row of zeros has a scale, too."""


def quantise_rows(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N] -> (q [..., N] of `dtype`, scale [...] float32). dtype: int8 or float8_e4m3fn, else ValueError."""
    limit = limit_of(dtype)
    amax = x.abs().amax(-1, keepdim=True).float().clamp_min(LEAST)
    q = x.float() * (limit / amax)
    q = q.round() if dtype == torch.int8 else q.clamp(-limit, limit)  # the last bit may lie beyond the limit
    return q.to(dtype), (amax / limit).squeeze(-1)


def limit_of(dtype: torch.dtype) -> float:
    """Raises ValueError for a dtype that rows are not quantised to."""
    limit = LIMITS.get(dtype)
    if limit is None:
        allowed = ", ".join(str(each) for each in LIMITS)
        raise ValueError(f"rows cannot be quantised to {dtype}; choose one of {allowed}")
    return limit
