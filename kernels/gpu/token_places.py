"""`token_places`: where the new tokens of a step stand, from what a `DevicePlan` has brought to the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.attention_parts import FIELDS
from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator

BLOCK = 128


@triton.jit
def _token_places_kernel(positions, slots, sequences, pages, PAGE_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """A program a block of a sequence's new tokens."""
    fields = sequences + tl.program_id(0) * FIELDS
    first_row, num_new, length = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = length - num_new + token
    page = tl.load(pages + tl.load(fields + 3) + position // PAGE_SIZE, mask=token < num_new, other=0).to(tl.int64)
    tl.store(positions + first_row + token, position.to(tl.int64), mask=token < num_new)
    tl.store(slots + first_row + token, page * PAGE_SIZE + position % PAGE_SIZE, mask=token < num_new)


def _places(
    sequences: torch.Tensor, pages: torch.Tensor, num_tokens: int, most_new: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    positions = sequences.new_empty(num_tokens, dtype=torch.int64)
    return positions, torch.empty_like(positions)


@operator(fake=_places)
def token_places(
    sequences: torch.Tensor, pages: torch.Tensor, num_tokens: int, most_new: int, page_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(positions, slots), [num_tokens] int64 each. sequences, pages, most_new: of a `DevicePlan`."""
    positions, slots = _places(sequences, pages, num_tokens, most_new, page_size)
    grid = (len(sequences), -(-most_new // BLOCK))
    _token_places_kernel[grid](positions, slots, sequences, pages, PAGE_SIZE=page_size, BLOCK=BLOCK, num_warps=4)
    return positions, slots


EXAMPLES = (
    Example(
        "pages of 64",
        lambda: token_places(meta(16, 4, dtype=torch.int32), meta(4096, dtype=torch.int32), 16, 1, 64),
    ),
)
