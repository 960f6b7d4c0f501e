"""`embedding`: the rows of a vocabulary shard that tokens name, zeros for tokens of other shards."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator

_BLOCK = 2048  # columns of a program


@triton.jit
def _embedding_kernel(out, tokens, weight, weight_stride, first, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program a block of columns of a token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    local = tl.load(tokens + token) - first
    held = (local >= 0) & (local < num_rows)
    values = tl.load(weight + local * weight_stride + column, mask=held & (column < WIDTH), other=0.0)
    tl.store(out + token * WIDTH + column, values, mask=column < WIDTH)


def _fake(tokens: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    return weight.new_empty((tokens.shape[0], weight.shape[1]))


@operator(fake=_fake)
def embedding(tokens: torch.Tensor, weight: torch.Tensor, first: int) -> torch.Tensor:
    """As `phalanx.kernels.embedding`, which calls it. weight: columns side by side."""
    out = _fake(tokens, weight, first)
    num_tokens, width = out.shape
    if out.numel():
        block = min(_BLOCK, triton.next_power_of_2(width))
        grid = (num_tokens, triton.cdiv(width, block))
        _embedding_kernel[grid](
            out, tokens.contiguous(), weight, weight.stride(0), first, weight.shape[0], WIDTH=width, BLOCK=block
        )
    return out


EXAMPLES = (
    Example("bf16 4096", lambda: embedding(meta(64, dtype=torch.int64), meta(32064, 4096), 64128)),
    Example("fp32 576", lambda: embedding(meta(64, dtype=torch.int64), meta(49152, 576, dtype=torch.float32), 0)),
)
