"""`expert_ffn_quantised`: the products of a mixture of experts by weights of 4 or 8 bits, with activations as they are.

As `expert_ffn`, in the same blocks of one expert each; a tile of them is summed as in `weight_only`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.expert_blocks import ExpertBlocks, expert_blocks
from phalanx.kernels.gpu.expert_ffn import combined
from phalanx.kernels.gpu.gated_mul import gated
from phalanx.kernels.gpu.linear import columns_side_by_side
from phalanx.kernels.gpu.linear_w4a16 import int4_shape, shift_of
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.weight_only import cuts_of, tile_sums

_HELD = {torch.int16: "int4", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


class Tile(NamedTuple):
    """Of a grouped product. few: whether its rows are few, as `weight_only` tells."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    few: bool


# By the largest number of an expert's rows, on average, that they are for. Not measured yet.
_TILES = ((24, Tile(16, 64, 128, 4, 3, True)), (160, Tile(64, 64, 64, 4, 3, False)))
_MANY = Tile(128, 128, 64, 8, 3, False)


@triton.jit(do_not_specialize=["num_slots", "num_blocks", "num_rows"])
def _expert_weight_only_kernel(
    out,
    x,
    weight,
    scales,
    offsets,
    slots,
    block_experts,
    routing,
    num_slots,
    num_blocks,
    num_rows,
    x_stride,
    weight_stride,
    scales_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    W_STRIDE: tl.constexpr,
    HELD: tl.constexpr,
    SHIFT: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    SLICE: tl.constexpr,
    SCALED: tl.constexpr,
    SLOTS_A_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program a tile of a block. weight_stride, scales_stride: between experts. routing: what a slot's row is
    multiplied by, or none. The rest as of `weight_only_kernel`.
    """
    OUTPUTS: tl.constexpr = N // 2 if GATED else N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block, n = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks * BLOCK_N
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert >= 0:
        slot = tl.load(slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
        held = slot < num_slots
        row = tl.where(held, slot // SLOTS_A_ROW, num_rows)
        column = n + tl.arange(0, BLOCK_N)
        within = tl.minimum(column, OUTPUTS - 1)
        w, s = weight + expert * weight_stride, scales + expert * scales_stride
        o = offsets
        if offsets is not None:
            o = offsets + expert * scales_stride
        total = tile_sums(
            x, w, s, o, row, within, x_stride, num_rows, 0, STEPS, N, K, W_STRIDE, HELD, SHIFT, GROUP, SPAN, SLICE,
            SCALED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        if GATED:
            up = tile_sums(
                x, w, s, o, row, OUTPUTS + within, x_stride, num_rows, 0, STEPS, N, K, W_STRIDE, HELD, SHIFT, GROUP,
                SPAN, SLICE, SCALED, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            total = gated(total, up, False)
        if routing is not None:
            total *= tl.load(routing + slot, mask=held, other=0.0)[None, :]
        place = out + slot.to(tl.int64)[None, :] * OUTPUTS + column[:, None]
        tl.store(place, total.to(out.dtype.element_ty), mask=held[None, :] & (column < OUTPUTS)[:, None])


def _fake(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_offsets: torch.Tensor | None,
    gate_up_group: int,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_offsets: torch.Tensor | None,
    down_group: int,
) -> torch.Tensor:
    return x_TH.new_empty(x_TH.shape)


@operator(fake=_fake)
def expert_ffn_quantised(
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    gate_up_offsets: torch.Tensor | None,
    gate_up_group: int,
    down: torch.Tensor,
    down_scales: torch.Tensor,
    down_offsets: torch.Tensor | None,
    down_group: int,
) -> torch.Tensor:
    """As `phalanx.kernels.expert_ffn`, which calls it. Weights of all experts as `linear_w4a16`, `linear_w8a16` and
    `linear_fp8_w8a16` have one's: [E, ...], their scales and offsets [E, groups, outputs].
    """
    num_tokens, num_chosen = experts_TK.shape
    if not num_tokens:
        return x_TH.new_empty(x_TH.shape)
    num_slots, num_experts = num_tokens * num_chosen, len(down)
    rows_each = num_slots / num_experts
    tile = next((tile for most, tile in _TILES if rows_each <= most), _MANY)
    blocks = expert_blocks(experts_TK, num_experts, tile.block_m)
    inner = x_TH.new_empty((num_slots, gate_up_scales.shape[2] // 2))
    x = columns_side_by_side(x_TH)
    _multiply(inner, x, gate_up, gate_up_scales, gate_up_offsets, gate_up_group, blocks, None, num_chosen, tile)
    parts = x.new_empty((num_slots, x.shape[1]))
    routing = weights_TK.contiguous()
    _multiply(parts, inner, down, down_scales, down_offsets, down_group, blocks, routing, 1, tile)
    return combined(parts, num_chosen)


def _multiply(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    group_size: int,
    blocks: ExpertBlocks,
    routing: torch.Tensor | None,
    slots_a_row: int,
    tile: Tile,
) -> None:
    """Fills out, a row a slot; gated where it is half as wide as the weight has rows. x: a row for `slots_a_row`."""
    num_outputs, num_inputs = scales.shape[2], x.shape[1]
    is_gated = num_outputs != out.shape[1]
    held = _HELD[weight.dtype]
    cuts = cuts_of(held, group_size, num_inputs, tile.block_k, few=tile.few)
    num_blocks = len(blocks.experts)
    _expert_weight_only_kernel[(num_blocks * triton.cdiv(out.shape[1], tile.block_n),)](
        out,
        x,
        weight.view(torch.uint8) if held == "fp8" else weight,
        scales,
        offsets,
        blocks.slots,
        blocks.experts,
        routing,
        len(out),
        num_blocks,
        len(x),
        x.stride(0),
        weight.stride(0),
        scales.stride(0),
        N=num_outputs,
        K=num_inputs,
        W_STRIDE=weight.stride(1),
        HELD=held,
        SHIFT=shift_of(x.dtype, signed=offsets is None) if held == "int4" else 0.0,
        GROUP=group_size,
        SPAN=cuts.span,
        SLICE=cuts.slice,
        SCALED=cuts.scaled,
        SLOTS_A_ROW=slots_a_row,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        GATED=is_gated,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _example(num_tokens: int, held: str) -> torch.Tensor:
    """8 of 128 experts, as Qwen3's."""
    hidden, columns, num_experts, group = 2048, 768, 128, 32 if held == "int4" else 2048

    def numbers(outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, int]:
        shape = int4_shape(outputs, inputs) if held == "int4" else (outputs, inputs)
        dtype = next(dtype for dtype, name in _HELD.items() if name == held)
        scales = meta(num_experts, -(-inputs // group), outputs, dtype=torch.float16)
        return meta(num_experts, *shape, dtype=dtype), scales, scales if held == "int4" else None, group

    return expert_ffn_quantised(
        meta(num_tokens, hidden),
        meta(num_tokens, 8, dtype=torch.int32),
        meta(num_tokens, 8, dtype=torch.float32),
        *numbers(2 * columns, hidden),
        *numbers(hidden, columns),
    )


EXAMPLES = (
    Example("bf16 1 token, int4", lambda: _example(1, "int4")),
    Example("bf16 8192 tokens, int4", lambda: _example(8192, "int4")),
)
