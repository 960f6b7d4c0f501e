"""`expert_ffn`: the products of a mixture of experts, as one grouped product with the gate behind it and one with the
routing's weights, and the sum over a token's experts in the order of its routing.

Blocks of one expert each come from `expert_blocks`. Grouped products by sorted blocks: Gale et al. 2022, "MegaBlocks",
arXiv 2211.15841.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.expert_blocks import ExpertBlocks, expert_blocks
from phalanx.kernels.gpu.gated_mul import gated
from phalanx.kernels.gpu.linear_persistent import describable, loaded
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.target import target_of

_COLUMNS = 1024  # of a program that adds


class Tile(NamedTuple):
    """Of a grouped product. weight_rows: of the weight at a time, half of them gates where it is gated. block_bytes: of
    each row, at a time.
    """

    block_m: int
    weight_rows: int
    block_bytes: int
    num_warps: int
    num_stages: int


# By the largest number of an expert's rows, on average, that they are for. Not measured yet.
_TILES = ((24, Tile(16, 64, 256, 4, 4)), (160, Tile(64, 128, 128, 4, 4)))
_EXACT = Tile(16, 64, 128, 4, 3)  # of float32, without tensor cores
_MANY = {80: Tile(128, 128, 128, 8, 3), 90: Tile(128, 256, 128, 8, 3)}


def tile_for(dtype: torch.dtype, num_slots: int, num_experts: int, arch: int) -> Tile:
    if dtype == torch.float32:
        return _EXACT
    rows_each = num_slots / num_experts
    return next((tile for most, tile in _TILES if rows_each <= most), _MANY[90 if arch >= 90 else 80])


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def _expert_product_kernel(
    out,
    x,
    weight,
    slots,
    block_experts,
    scales,
    num_slots,
    num_blocks,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SLOTS_A_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """A program a tile of a block; neighbours have the columns of the weight in common, and often the expert.

    weight: of all experts one below the other, [E N, K]; a tensor descriptor if TMA. scales: of each slot, or none.
    """
    OUTPUTS: tl.constexpr = N // 2 if GATED else N
    block, n = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks * BLOCK_N
    expert = tl.load(block_experts + block)
    if expert >= 0:
        slot = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
        held = slot < num_slots
        at = tl.arange(0, BLOCK_K)
        x_block = x + (slot // SLOTS_A_ROW).to(tl.int64)[:, None] * x_stride + at[None, :]
        first = expert * N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) if GATED else total
        for start in range(0, K, BLOCK_K):
            part = tl.load(x_block + start, mask=held[:, None] & (start + at < K)[None, :], other=0.0)
            w = loaded(weight, first + n, start, K, first + N, K, BLOCK_N, BLOCK_K, TMA)
            total = tl.dot(part, w.T, total, input_precision=PRECISION)
            if GATED:
                w_up = loaded(weight, first + OUTPUTS + n, start, K, first + N, K, BLOCK_N, BLOCK_K, TMA)
                up = tl.dot(part, w_up.T, up, input_precision=PRECISION)
        if GATED:
            total = gated(total, up, False)
        if scales is not None:
            total *= tl.load(scales + slot, mask=held, other=0.0)[:, None]
        column = n + tl.arange(0, BLOCK_N)
        place = out + slot.to(tl.int64)[:, None] * OUTPUTS + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=held[:, None] & (column < OUTPUTS)[None, :])


@triton.jit
def _combine_kernel(out, parts, WIDTH: tl.constexpr, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    """A program a block of columns of a token."""
    num_blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // num_blocks).to(tl.int64)
    column = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for number in range(CHOSEN):
        part = parts + (token * CHOSEN + number) * WIDTH + column
        total += tl.load(part, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)


def _fake(
    x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return x_TH.new_empty(x_TH.shape)


@operator(fake=_fake)
def expert_ffn(
    x_TH: torch.Tensor, experts_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """As `phalanx.kernels.expert_ffn`, which calls it."""
    num_tokens, num_chosen = experts_TK.shape
    if not num_tokens:
        return _fake(x_TH, experts_TK, weights_TK, gate_up, down)
    x = x_TH if x_TH.stride(1) == 1 else x_TH.contiguous()
    num_experts, hidden, num_columns = down.shape
    tile = tile_for(x.dtype, num_tokens * num_chosen, num_experts, target_of(x).arch)
    blocks = expert_blocks(experts_TK, num_experts, tile.block_m)
    inner = x.new_empty((num_tokens * num_chosen, num_columns))
    _multiply(inner, x, gate_up, blocks, None, num_chosen, tile)
    parts = x.new_empty((num_tokens * num_chosen, hidden))
    _multiply(parts, inner, down, blocks, weights_TK.contiguous(), 1, tile)
    return combined(parts, num_chosen)


def combined(parts: torch.Tensor, num_chosen: int) -> torch.Tensor:
    """The sums of so many rows each, in float32 and in their order."""
    num_tokens, hidden = len(parts) // num_chosen, parts.shape[1]
    out = parts.new_empty((num_tokens, hidden))
    block = min(_COLUMNS, triton.next_power_of_2(hidden))
    grid = (num_tokens * triton.cdiv(hidden, block),)
    _combine_kernel[grid](out, parts, WIDTH=hidden, CHOSEN=num_chosen, BLOCK=block, num_warps=4)
    return out


def _multiply(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    blocks: ExpertBlocks,
    scales: torch.Tensor | None,
    slots_a_row: int,
    tile: Tile,
) -> None:
    """Fills out, a row a slot; gated where it is half as wide as the weight has rows. x: a row for `slots_a_row`."""
    num_rows, num_inputs = weight.shape[1:]
    is_gated = num_rows != out.shape[1]
    block_n = tile.weight_rows // (2 if is_gated else 1)
    block_k = tile.block_bytes // x.itemsize
    rows = weight.reshape(-1, num_inputs)
    tma = target_of(x).arch >= 90 and describable(rows)
    held: Any = TensorDescriptor.from_tensor(rows, [block_n, block_k]) if tma else rows
    num_blocks = len(blocks.experts)
    _expert_product_kernel[(num_blocks * triton.cdiv(out.shape[1], block_n),)](
        out,
        x,
        held,
        blocks.slots,
        blocks.experts,
        scales,
        len(out),
        num_blocks,
        x.stride(0),
        N=num_rows,
        K=num_inputs,
        SLOTS_A_ROW=slots_a_row,
        BLOCK_M=tile.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GATED=is_gated,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        TMA=tma,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _example(
    num_tokens: int, hidden: int, columns: int, experts: int, chosen: int, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    return expert_ffn(
        meta(num_tokens, hidden, dtype=dtype),
        meta(num_tokens, chosen, dtype=torch.int32),
        meta(num_tokens, chosen, dtype=torch.float32),
        meta(experts, 2 * columns, hidden, dtype=dtype),
        meta(experts, hidden, columns, dtype=dtype),
    )


def _many_rows(*, is_gated: bool) -> torch.Tensor:
    """A product alone, with the largest tile of each architecture."""
    tile = tile_for(torch.bfloat16, 1 << 16, 128, target_of(meta(1)).arch)
    blocks = ExpertBlocks(meta(640 * 128, dtype=torch.int32), meta(640, dtype=torch.int32), tile.block_m)
    x, weight = (meta(8192, 2048), meta(128, 1536, 2048)) if is_gated else (meta(1 << 16, 768), meta(128, 2048, 768))
    out = meta(1 << 16, 768 if is_gated else 2048)
    scales = None if is_gated else meta(8192, 8, dtype=torch.float32)
    _multiply(out, x, weight, blocks, scales, 8 if is_gated else 1, tile)
    return out


EXAMPLES = (  # with `expert_blocks`
    Example("bf16 1 token, 8 of 128", lambda: _example(1, 2048, 768, 128, 8)),
    Example("bf16 3 tokens, unaligned", lambda: _example(3, 70, 90, 8, 2)),
    Example("fp16 128 tokens, 2 of 8", lambda: _example(128, 4096, 3584, 8, 2, torch.float16)),
    Example("fp32 1024 tokens, 2 of 8", lambda: _example(1024, 512, 640, 8, 2, torch.float32)),
    Example("bf16 8192 tokens, gates", lambda: _many_rows(is_gated=True), instructions=("wgmma", "tma")),
    Example("bf16 8192 tokens, down", lambda: _many_rows(is_gated=False), instructions=("wgmma", "tma")),
)
