"""`route`: of each token the experts with the largest logits, and their weights. A program some tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.largest import key_of
from phalanx.kernels.gpu.operator import operator

_TILE = 1024  # logits of a program


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    experts,
    weights,
    logits,
    stride,
    num_tokens,
    NUM_EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    SIGMOID: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One expert after another is the largest of those that are left."""
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    expert = tl.arange(0, BLOCK_E)[None, :]
    place = tl.arange(0, BLOCK_K)[None, :]
    inside = (token < num_tokens)[:, None] & (expert < NUM_EXPERTS)
    value = tl.load(logits + token[:, None] * stride + expert, mask=inside, other=float("-inf")).to(tl.float32)
    key = tl.where(expert < NUM_EXPERTS, key_of(value, expert, 0x7FFFFFFF), -(1 << 63))
    largest = tl.max(value, 1)
    score = tl.sigmoid(value) if SIGMOID else tl.exp(value - largest[:, None])
    whole = tl.full((BLOCK_T,), 1.0, tl.float32) if SIGMOID else tl.sum(score, 1)
    chosen = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    kept = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for number in range(CHOSEN):
        best = tl.max(key, 1)[:, None]
        weight = tl.sum(tl.where(key == best, score, 0.0), 1)[:, None]
        chosen = tl.where(place == number, (0x7FFFFFFF - (best & 0x7FFFFFFF)).to(tl.int32), chosen)
        kept = tl.where(place == number, weight, kept)
        key = tl.where(key == best, -(1 << 63), key)
    if RENORMALISE:
        whole = tl.sum(kept, 1)
    stored = (token < num_tokens)[:, None] & (place < CHOSEN)
    tl.store(experts + token[:, None] * CHOSEN + place, chosen, mask=stored)
    tl.store(weights + token[:, None] * CHOSEN + place, kept / whole[:, None], mask=stored)


def _fake(logits_TE: torch.Tensor, num_chosen: int, score: str, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits_TE.shape[0], num_chosen
    return logits_TE.new_empty(shape, dtype=torch.int32), logits_TE.new_empty(shape, dtype=torch.float32)


@operator(fake=_fake)
def route(logits_TE: torch.Tensor, num_chosen: int, score: str, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As `phalanx.kernels.route`, which calls it. Of a token whose logits are not numbers, some experts that differ."""
    experts, weights = _fake(logits_TE, num_chosen, score, renormalise)
    logits = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    num_tokens, num_experts = logits.shape
    if num_tokens:
        block_e = triton.next_power_of_2(num_experts)
        block_t = max(1, _TILE // block_e)
        _route_kernel[(triton.cdiv(num_tokens, block_t),)](
            experts,
            weights,
            logits,
            logits.stride(0),
            num_tokens,
            NUM_EXPERTS=num_experts,
            CHOSEN=num_chosen,
            SIGMOID=score == "sigmoid",
            RENORMALISE=renormalise,
            BLOCK_T=block_t,
            BLOCK_E=block_e,
            BLOCK_K=triton.next_power_of_2(num_chosen),
            num_warps=4,
        )
    return experts, weights


EXAMPLES = (
    Example("bf16 8 of 128", lambda: route(meta(64, 128), 8, "softmax", True)),
    Example("fp32 sigmoid 8 of 256", lambda: route(meta(64, 256, dtype=torch.float32), 8, "sigmoid", True)),
)
