"""Counter-based random numbers: a draw depends on its key alone, never on what was drawn before it or beside it."""

from __future__ import annotations

import torch

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the increment of SplitMix64, as a signed 64-bit number
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def splitmix64(x: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output for state x (Steele, Lea and Flood 2014), elementwise on int64 read as unsigned."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def gumbel_noise(seeds: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise for each token of each row, float64 of the broadcast shape.

    seeds, positions: [B, 1] int64, a request's seed and the position of the token to be drawn. tokens: [V] or [B, V]
    ids. A token with the largest logit + noise is a draw from the softmax (Gumbel 1954), and since the noise of a
    token depends on (seed, position, token) alone, a rank draws from its own vocabulary rows and only the best leaves
    it.
    """
    key = splitmix64(splitmix64(seeds) ^ positions)
    bits = _shift_right(splitmix64(key + tokens * _GOLDEN), 11)
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)
