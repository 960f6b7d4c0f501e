"""`linear_w4a16`: y = x W^T + b with W in groups of 4-bit integers, as AWQ (Lin et al. 2023, arXiv 2306.00978) and
GPTQ (Frantar et al. 2022, arXiv 2210.17323) have them: W[n, k] = scales[g, n] * q[n, k] + offsets[g, n], where g is
k // group_size.

How the integers lie: 64 inputs of an output in 16 words of 16 bits, those of the next output behind them, and behind
all outputs the next 64 inputs. Word j has inputs j, 16 + j, 32 + j and 48 + j, from the lowest bits on. So what a
program reads for any number of outputs lies in one piece, and the words of an output shifted once are 16 inputs side by
side. Integers below zero are held 8 higher.
"""

from __future__ import annotations

import torch

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.linear import choice_for, columns_side_by_side
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.weight_only import CHUNK, NIBBLES, weight_only
from phalanx.kernels.linear_table import Choice

_WORDS = CHUNK // NIBBLES
SIGNED = 8
"""What is added to integers from -8 to 7."""

# The numbers whose last bits are the weight's, by what these are added to: see `weight_only.from_nibbles`.
_SHIFTS = {torch.bfloat16: 128.0, torch.float16: 1024.0, torch.float32: 0.0}


def shift_of(dtype: torch.dtype, *, signed: bool) -> float:
    """What weights are too large by, as numbers of `dtype` that the kernel makes of their bits."""
    return _SHIFTS[dtype] + (SIGNED if signed else 0)


def int4_shape(num_outputs: int, num_inputs: int) -> tuple[int, int, int]:
    """Of the int16 that `pack_int4` makes."""
    return -(-num_inputs // CHUNK), num_outputs, _WORDS


def pack_int4(q: torch.Tensor, *, signed: bool) -> torch.Tensor:
    """q [R, K] of any whole dtype, from 0 to 15, or -8 to 7 where `signed` -> [chunks, R, 16] int16."""
    num_rows, num_inputs = q.shape
    wide = q.new_zeros((num_rows, -(-num_inputs // CHUNK) * CHUNK), dtype=torch.int32)
    wide[:, :num_inputs] = q
    if signed:
        wide += SIGNED
    parts = wide.view(num_rows, -1, NIBBLES, _WORDS).transpose(0, 1)
    words = sum(parts[:, :, number] << (4 * number) for number in range(NIBBLES))
    assert isinstance(words, torch.Tensor)
    return words.to(torch.int16).contiguous()


def unpack_int4(packed: torch.Tensor, num_inputs: int, *, signed: bool) -> torch.Tensor:
    """What `pack_int4` was given, [R, K] int8."""
    words = packed.to(torch.int32)
    parts = torch.stack([(words >> (4 * number)) & 0xF for number in range(NIBBLES)], 2)  # [chunks, R, 4, 16]
    q = parts.transpose(0, 1).flatten(1)[:, :num_inputs]
    return (q - SIGNED if signed else q).to(torch.int8)


def _fake(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], packed.shape[1]))


@operator(fake=_fake)
def linear_w4a16(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
) -> torch.Tensor:
    """x [m, k] of a floating dtype, packed as by `pack_int4`, scales and offsets [groups, n] of one, bias [n] -> [m, n]
    of x's dtype. Without offsets the integers are from -8 to 7, with them from 0 to 15. group_size: a multiple of 8, or
    at least k for one group.
    """
    return multiply(x, packed, scales, offsets, bias, group_size)


def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    bias: torch.Tensor | None,
    group_size: int,
    *,
    choice: Choice | None = None,
) -> torch.Tensor:
    """choice: by the table of the GPU where it is None."""
    out = _fake(x, packed, scales, offsets, bias, group_size)
    if out.numel():
        weight_only(
            out,
            columns_side_by_side(x),
            packed,
            scales,
            offsets,
            bias,
            held="int4",
            shift=shift_of(x.dtype, signed=offsets is None),
            group_size=group_size,
            choice=choice or choice_for(x, x.dtype, packed.shape[1], held="w4a16"),
        )
    return out


def _example(
    m: int, n: int, k: int, group: int, *, offsets: bool = True, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    half = torch.float16
    scales = meta(-(-k // group), n, dtype=half)
    packed = meta(*int4_shape(n, k), dtype=torch.int16)
    return linear_w4a16(meta(m, k, dtype=dtype), packed, scales, scales if offsets else None, None, group)


EXAMPLES = (  # with `weight_only`
    Example("bf16 1x4096x4096 by 32", lambda: _example(1, 4096, 4096, 32)),
    Example("bf16 16x8192x8192 by 128", lambda: _example(16, 8192, 8192, 128), instructions=("wgmma",)),
    Example("fp16 64x4096x4096 by 128, signed", lambda: _example(64, 4096, 4096, 128, offsets=False, dtype=torch.half)),
    Example("bf16 8x576x1000 by 24", lambda: _example(8, 576, 1000, 24)),
    Example("bf16 2048x4096x4096 by 32", lambda: _example(2048, 4096, 4096, 32), instructions=("wgmma",)),
)
