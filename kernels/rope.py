"""`rope`: rotary position embedding (Su et al. 2021, arXiv 2104.09864), halves turned against each other."""

from __future__ import annotations

import math

import torch

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.compiled import compilable

_NATIVE = {dtype: native_cpu.FLOAT_CODES[dtype] for dtype in (torch.bfloat16, torch.float32)}


def rope_frequencies(
    head_dim: int,
    theta: float,
    *,
    factor: float = 1.0,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    original_max_position: int = 0,
) -> torch.Tensor:
    """Angles per position, [head_dim / 2] float32.

    factor alone divides every frequency (linear scaling). With low_freq_factor and high_freq_factor it is Llama 3.1's
    scaling: wavelengths above original_max_position / low_freq_factor are divided by `factor`, those below
    original_max_position / high_freq_factor are kept, and those between are blended linearly in their ratio.
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if low_freq_factor is None or high_freq_factor is None:
        return frequency / factor
    turns = original_max_position * frequency / (2 * math.pi)  # full turns inside the original context
    blend = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequency / factor * (1 - blend) + frequency * blend


def rope_table(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [T, 1, head_dim] in `dtype` for positions [T] int64; computed once a step for all layers.

    frequencies: [head_dim / 2] float32. Angles are float32, and so are their cosines before they are rounded.
    """
    code = _NATIVE.get(dtype)
    if code is not None and native_cpu.applies_on(positions.device) and positions.is_contiguous():
        half = len(frequencies)
        cos = torch.empty((len(positions), 1, 2 * half), dtype=dtype)
        sin = torch.empty_like(cos)
        addresses = cos.data_ptr(), sin.data_ptr(), positions.data_ptr(), frequencies.data_ptr()
        native_cpu.LIBRARY.rope_table(*addresses, len(positions), half, code)
        return cos, sin
    gpu = triton_gpu.operators_for(positions)
    if gpu is not None:
        return gpu.rope_table(positions, frequencies, dtype)  # type: ignore[no-any-return]
    return _rope_table(positions, frequencies, dtype)


@compilable
def _rope_table(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.outer(positions.to(torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@compilable
def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [T, heads, head_dim] by cos, sin [T, 1, head_dim] -> the same shape and dtype."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
