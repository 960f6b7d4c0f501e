"""`rope_table`: cosines and sines of rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator


@triton.jit
def _turned(angles):
    """(cos, sin) of float32 angles, to float32's precision: Taylor's series in float64 within an eighth of a turn.

    The library's functions keep a table in local memory for angles of any size; these are right up to 2^31 turns.
    """
    wide = angles.to(tl.float64)
    quarter = tl.floor(wide * 0.6366197723675814 + 0.5)  # 2 / pi
    r = wide - quarter * 1.5707963267948966 - quarter * 6.123233995736766e-17  # pi / 2, and what float64 lacks of it
    r2 = r * r
    cosine = 1 - r2 / 2 * (1 - r2 / 12 * (1 - r2 / 30 * (1 - r2 / 56 * (1 - r2 / 90))))
    sine = r * (1 - r2 / 6 * (1 - r2 / 20 * (1 - r2 / 42 * (1 - r2 / 72 * (1 - r2 / 110)))))
    turn = quarter.to(tl.int64) & 3
    odd = (turn & 1) == 1
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((turn == 1) | (turn == 2), -cos, cos).to(tl.float32), tl.where(turn >= 2, -sin, sin).to(tl.float32)


@triton.jit
def _rope_table_kernel(cos, sin, positions, frequencies, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """A program a token."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < HALF
    angles = tl.load(positions + token).to(tl.float32) * tl.load(frequencies + at, mask=inside, other=0.0)
    cosines, sines = _turned(angles)
    cosines, sines = cosines.to(cos.dtype.element_ty), sines.to(sin.dtype.element_ty)
    place = token * 2 * HALF + at
    tl.store(cos + place, cosines, mask=inside)
    tl.store(cos + place + HALF, cosines, mask=inside)
    tl.store(sin + place, sines, mask=inside)
    tl.store(sin + place + HALF, sines, mask=inside)


def _fake(positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    shape = positions.shape[0], 1, 2 * frequencies.shape[0]
    return frequencies.new_empty(shape, dtype=dtype), frequencies.new_empty(shape, dtype=dtype)


@operator(fake=_fake)
def rope_table(
    positions: torch.Tensor, frequencies: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `phalanx.kernels.rope_table`, which calls it."""
    cos, sin = _fake(positions, frequencies, dtype)
    half = frequencies.shape[0]
    if cos.numel():
        _rope_table_kernel[(positions.shape[0],)](
            cos,
            sin,
            positions.contiguous(),
            frequencies.contiguous(),
            HALF=half,
            BLOCK=triton.next_power_of_2(half),
            num_warps=1,
        )
    return cos, sin


EXAMPLES = (
    Example("bf16 128", lambda: rope_table(meta(64, dtype=torch.int64), meta(64, dtype=torch.float32), torch.bfloat16)),
)
