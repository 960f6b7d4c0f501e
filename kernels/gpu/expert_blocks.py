"""The tokens of a mixture of experts in blocks of one expert each, so that a tile of a product has one weight.

How many blocks there are is known on the GPU alone. There is room, and there are programs, for as many as there may be:
nothing waits for the host, and a CUDA graph holds for any routing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

_CHUNK = 1024


class ExpertBlocks(NamedTuple):
    """slots: [blocks * block_m] int32, of each row of a block the place t * K + k in the routing that it is, or T * K
    for none. experts: [blocks] int32, of each block, or -1 for one without rows.
    """

    slots: torch.Tensor
    experts: torch.Tensor
    block_m: int


@triton.jit(do_not_specialize=["num_slots", "max_blocks"])
def _expert_blocks_kernel(
    slots,
    block_experts,
    experts,
    num_slots,
    max_blocks,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program an expert: it counts for all, which says where its own blocks begin, and lists its own rows."""
    mine = tl.program_id(0)
    each = tl.arange(0, BINS)
    lane = tl.arange(0, CHUNK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, num_slots, CHUNK):
        slot = start + lane
        counts += tl.histogram(tl.load(experts + slot, mask=slot < num_slots, other=BINS - 1), BINS)
    counts = tl.where(each < NUM_EXPERTS, counts, 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(each < mine, blocks, 0), 0)
    num_blocks = tl.sum(tl.where(each == mine, blocks, 0), 0)
    for start in range(0, num_blocks, CHUNK):
        tl.store(block_experts + first + start + lane, mine, mask=start + lane < num_blocks)
    filled = first * BLOCK_M
    for start in range(0, num_slots, CHUNK):
        slot = start + lane
        belongs = tl.load(experts + slot, mask=slot < num_slots, other=BINS - 1) == mine
        place = filled + tl.cumsum(belongs.to(tl.int32), 0) - 1
        tl.store(slots + place, slot, mask=belongs)
        filled += tl.sum(belongs.to(tl.int32), 0)
    rest = filled + tl.arange(0, BLOCK_M)
    tl.store(slots + rest, num_slots, mask=rest < (first + num_blocks) * BLOCK_M)
    if mine == NUM_EXPERTS - 1:
        for start in range(first + num_blocks, max_blocks, CHUNK):
            tl.store(block_experts + start + lane, -1, mask=start + lane < max_blocks)


def expert_blocks(experts_TK: torch.Tensor, num_experts: int, block_m: int) -> ExpertBlocks:
    """experts: int32, as `route` gives them. block_m: rows of a block, a power of two."""
    num_slots = experts_TK.numel()
    max_blocks = num_slots // block_m + min(num_experts, num_slots)
    slots = experts_TK.new_empty(max_blocks * block_m)
    block_experts = experts_TK.new_empty(max_blocks)
    _expert_blocks_kernel[(num_experts,)](
        slots,
        block_experts,
        experts_TK.contiguous(),
        num_slots,
        max_blocks,
        NUM_EXPERTS=num_experts,
        BLOCK_M=block_m,
        BINS=triton.next_power_of_2(num_experts + 1),
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return ExpertBlocks(slots, block_experts, block_m)
