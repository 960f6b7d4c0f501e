"""`quantise_rows`: rows in 8 bits, each with a scale of its own, as the operators called `..._quantised` give them.

q = round(x * limit / amax), scale = amax / limit, so that x is nearly q * scale: per-token quantisation, as SmoothQuant
(Xiao et al. 2022, arXiv 2211.10438) does it to int8.
"""

from __future__ import annotations

import torch

from phalanx.kernels import triton_gpu

LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""The largest number of a format that rows are quantised to."""

LEAST = 1e-30
"""The smallest amax that counts: a row of zeros has a scale, too."""


def quantise_rows(
    x: torch.Tensor, dtype: torch.dtype, group_size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., N] -> (q [..., N] of `dtype`, scale [...] float32). dtype: int8 or float8_e4m3fn, else ValueError.

    group_size: with a scale for each group of so many columns, which divide N: [..., N / group_size].
    """
    limit = limit_of(dtype)
    if group_size is not None and x.shape[-1] % group_size:
        raise ValueError(f"rows of {x.shape[-1]} do not fall into groups of {group_size}")
    gpu = triton_gpu.narrowing_operators_for(x, dtype)
    if gpu is not None:
        return gpu.quantise_rows(x, dtype, group_size)  # type: ignore[no-any-return]
    if group_size is not None:
        q, scales = quantise_rows(x.reshape(*x.shape[:-1], -1, group_size), dtype)
        return q.flatten(-2), scales
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
