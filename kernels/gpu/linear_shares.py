"""Equal shares of the steps of all tiles of a product, wherever tiles begin and end (Osama et al. 2023, "Stream-K",
arXiv 2301.03598).

Where a tile is cut between programs each leaves its part of the sum, and the one that comes last adds the parts in
order: the same numbers each time, whoever that is. With a program a tile nothing is cut.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.linear_parts import MAX_TILES, counters_of
from phalanx.kernels.gpu.target import target_of
from phalanx.kernels.linear_table import Choice


@triton.jit
def owner_of(step, num_steps, num_programs):
    """The program whose share has this step."""
    return (((step + 1) * num_programs.to(tl.int64) - 1) // num_steps).to(tl.int32)


@triton.jit
def share_start(program, num_steps, num_programs):
    return (program * num_steps.to(tl.int64) // num_programs).to(tl.int32)


@triton.jit
def met(
    total,
    up,
    partials,
    counters,
    in_tile,
    tile,
    program,
    first,
    num_steps,
    num_programs,
    STEPS: tl.constexpr,
    GATED: tl.constexpr,
):
    """A program's part of a tile, left for the one that comes last; (total, up, whether it is this one, and they are
    whole). first: step of the tile that the part begins with. up: beside it where the product is gated. in_tile: place
    of each number, from 0 on.
    """
    TILE: tl.constexpr = total.shape[0] * total.shape[1]
    HALVES: tl.constexpr = 2 if GATED else 1
    # A program has at most two parts of tiles: one that it ends, and one that it begins.
    slot = (program * 2 + tl.where(first == 0, 1, 0)).to(tl.int64) * HALVES * TILE
    tl.store(partials + slot + in_tile, total)
    if GATED:
        tl.store(partials + slot + TILE + in_tile, up)
    tl.debug_barrier()  # all threads have written before one tells
    first_owner = owner_of(tile * STEPS, num_steps, num_programs)
    last_owner = owner_of(tile * STEPS + STEPS - 1, num_steps, num_programs)
    comes_last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == last_owner - first_owner
    if comes_last:
        total = tl.zeros_like(total)
        up = tl.zeros_like(up) if GATED else total
        for owner in range(first_owner, last_owner + 1):
            slot = (owner * 2 + tl.where(owner == first_owner, 1, 0)).to(tl.int64) * HALVES * TILE
            total += tl.load(partials + slot + in_tile, cache_modifier=".cg")
            if GATED:
                up += tl.load(partials + slot + TILE + in_tile, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return total, up, comes_last


def shared_by(x: torch.Tensor, tiles: int, steps: int, choice: Choice) -> int:
    """How many programs share so many tiles, of so many steps each. x: on whose GPU. Raises ValueError for more tiles
    than can be met at.
    """
    if choice.kernel == "tiles":
        return tiles
    if tiles > MAX_TILES:
        raise ValueError(f"{tiles} tiles in a product of few rows; {MAX_TILES} is the most: take larger ones")
    return min(tiles * steps, choice.per_sm * target_of(x).num_sms)


def room_to_meet(
    x: torch.Tensor, num_programs: int, tile_size: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """(two parts of a tile for each program, counters), as `met` wants them. x: on whose device."""
    return torch.empty(2 * num_programs * tile_size, dtype=dtype, device=x.device), counters_of(x)
