"""Parts of the kernels that draw tokens: random numbers, and passes over rows of logits."""

from __future__ import annotations

import triton
import triton.language as tl

from phalanx.kernels.gpu.largest import key_of


@triton.jit
def _splitmix64(x):
    """As `phalanx.kernels.random.splitmix64`, of uint64."""
    x = x + 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def gumbel(seed, position, token):
    """As `phalanx.kernels.random.gumbel_noise`, float64. seed, position: scalars; token: a block, int64."""
    key = _splitmix64(_splitmix64(seed.to(tl.uint64)) ^ position.to(tl.uint64))
    bits = _splitmix64(key + token.to(tl.uint64) * 0x9E3779B97F4A7C15) >> 11
    uniform = (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def scaled_at(logits, column, width, temperature, floor):
    """Logits over the temperature, float64, with what lies below the floor, or outside, at minus infinity."""
    value = tl.load(logits + column, mask=column < width, other=float("-inf")).to(tl.float64) / temperature
    return tl.where(value < floor, float("-inf"), value)


@triton.jit
def keys_at(logits, column, width, COLUMN_BITS: tl.constexpr):
    """Logits and their columns as numbers, by `key_of`."""
    return key_of(tl.load(logits + column, mask=column < width, other=0.0), column, (1 << COLUMN_BITS) - 1)


@triton.jit
def mass_above(
    logits, width, cut, temperature, floor, top, COUNTED: tl.constexpr, COLUMN_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of the entries of a row whose keys are at least `cut`: how many, or their exp(value - top), float64."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, width, BLOCK):
        column = begin + lane
        if COUNTED:
            part = tl.full((BLOCK,), 1.0, tl.float64)
        else:
            part = tl.exp(scaled_at(logits, column, width, temperature, floor) - top)
        total += tl.where((keys_at(logits, column, width, COLUMN_BITS) >= cut) & (column < width), part, 0.0)
    return tl.sum(total, 0)


@triton.jit
def highest_cut(
    logits, width, least, temperature, floor, top, COUNTED: tl.constexpr, COLUMN_BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The highest cut above which there is at least so much, found bit by bit: of values, then of columns."""
    one, lowest = tl.full((), 1, tl.int64), tl.full((), -(1 << 63), tl.int64)
    found = tl.full((), 0, tl.int64)
    for number in range(32 + COLUMN_BITS):
        bit = tl.where(number < 32, 63 - number, 31 + COLUMN_BITS - number)
        tried = found | (one << bit)
        mass = mass_above(logits, width, tried ^ lowest, temperature, floor, top, COUNTED, COLUMN_BITS, BLOCK)
        found = tl.where(mass >= least, tried, found)
    return found ^ lowest
