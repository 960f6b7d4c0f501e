"""`prefill_attention`: chunks of new tokens over pages of keys and values, with a running softmax over tiles
(FlashAttention-2: Dao 2023, arXiv 2307.08691).

The query heads that share a KV head lie in one tile, token after token, so that its keys are read once for all of them.
Keys that every query of a tile sees are computed without a mask. On Hopper, where pages hold whole tiles, of 64
positions or of 32 in 8 bits, these come through tensor descriptors (TMA), which make zeros of what is beyond the head
dimension; but for heads wider than 128, whose tiles leave no registers for it. Warps are not specialised: Triton 3.7
ignores `warp_specialize` for sm_90 with 8 warps, and with 4 its pass fails on this loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from phalanx.kernels.gpu.attention_parts import (
    FIELDS,
    FLOAT8,
    LIFT,
    as_read,
    bent,
    exponents,
    heads_of,
    scales_at,
    softmax_step,
    widened,
    with_heads_together,
)
from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.target import target_of


@triton.jit
def _tile(
    cache, page_stride, slot_stride, head_stride, page_table, kv, block, least, length, dtype: tl.constexpr,
    FLOAT8_BITS: tl.constexpr, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, BLANK: tl.constexpr,
):  # fmt: skip
    """Keys or values [BLOCK_N, BLOCK_D] of a block of positions, as `dtype`. MASKED: there may be positions below
    `least` or from `length` on, which may never have been written. BLANK: zeros there, not just anything.
    """
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n >= least) & (n < length)
    if TMA:
        page = tl.load(page_table + block * BLOCK_N // PAGE_SIZE)
        x = widened(
            cache.load([page, kv, block * BLOCK_N % PAGE_SIZE, 0]).reshape(BLOCK_N, BLOCK_D), dtype, FLOAT8_BITS
        )
        if MASKED and BLANK:
            x = tl.where(inside[:, None], x, 0.0).to(dtype)
    else:
        d = tl.arange(0, BLOCK_D)
        if MASKED:
            page = tl.load(page_table + n // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
            mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        else:
            page = tl.load(page_table + n // PAGE_SIZE).to(tl.int64)
            mask = (d < HEAD_DIM)[None, :]
        at = page * page_stride + (n % PAGE_SIZE) * slot_stride + kv * head_stride
        x = widened(tl.load(cache + at[:, None] + d[None, :], mask=mask, other=0.0), dtype, FLOAT8_BITS)
    return x


@triton.jit
def _scales(
    scales, page_table, kv, block, least, length, NUM_KV: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """[1, BLOCK_N] of the positions of a block; 0 below `least` and from `length` on."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (n >= least) & (n < length)
    page = tl.load(page_table + n // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
    return scales_at(scales, page, kv, n % PAGE_SIZE, inside, NUM_KV, PAGE_SIZE)[None, :]


@triton.jit
def _attend(
    q, m, total, acc, begin, end, position, key_cache, value_cache, key_scales, value_scales, k_page_stride,
    k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, page_table, kv, least, length, scale,
    softcap,
    NUM_KV: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT8_BITS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """(m, total, acc) with the blocks from begin to end. MASKED: not every row sees all of them."""
    for block in tl.range(begin, end):
        k = _tile(
            key_cache, k_page_stride, k_slot_stride, k_head_stride, page_table, kv, block, least, length, q.dtype,
            FLOAT8_BITS, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, MASKED, False,
        )  # fmt: skip
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        if key_scales is not None:
            products *= _scales(key_scales, page_table, kv, block, least, length, NUM_KV, PAGE_SIZE, BLOCK_N)
        scores = bent(products, scale, softcap, SOFTCAP)
        if MASKED:
            n = (block * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
            seen = n <= position[:, None]
            if WINDOW:
                seen &= n > position[:, None] - WINDOW
            scores = tl.where(seen, scores, -float("inf"))
        weights, m, total, acc = softmax_step(scores, m, total, acc)
        if value_scales is not None:
            weights *= _scales(value_scales, page_table, kv, block, least, length, NUM_KV, PAGE_SIZE, BLOCK_N) * LIFT
        v = _tile(
            value_cache, v_page_stride, v_slot_stride, v_head_stride, page_table, kv, block, least, length, q.dtype,
            FLOAT8_BITS, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, MASKED, True,
        )  # fmt: skip
        acc = tl.dot(weights.to(q.dtype), v, acc, input_precision="ieee")
    return m, total, acc


@triton.jit
def _prefill_kernel(
    out, query, key_cache, value_cache, sequences, pages, head_table, key_scales, value_scales, query_stride,
    k_page_stride, k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, scale, softcap,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT8_BITS: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program a tile of new tokens, a KV head and a sequence. TMA: the caches are descriptors, and a page holds
    whole tiles.

    WINDOW: 0 for none. head_table, scales: None where there are none.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP  # of a tile
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that see the most first
    kv, sequence = tl.program_id(1), tl.program_id(2)
    first_row = tl.load(sequences + sequence * FIELDS).to(tl.int64)
    num_new = tl.load(sequences + sequence * FIELDS + 1)
    length = tl.load(sequences + sequence * FIELDS + 2)
    page_table = pages + tl.load(sequences + sequence * FIELDS + 3)
    if tile * TOKENS >= num_new:
        return

    r, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    token = tile * TOKENS + r // GROUP
    head = heads_of(head_table, kv, r % GROUP, GROUP)
    present = ((r < TOKENS * GROUP) & (token < num_new) & (head >= 0))[:, None] & (d < HEAD_DIM)[None, :]
    token = tl.minimum(token, num_new - 1)
    position = length - num_new + token
    q = query + (first_row + token)[:, None] * query_stride + head[:, None] * HEAD_DIM + d[None, :]
    q = tl.load(q, mask=present, other=0.0)

    lowest = length - num_new + tile * TOKENS  # of the tile's tokens, and the highest
    highest = tl.minimum(lowest + TOKENS, length) - 1
    least = tl.maximum(lowest - WINDOW + 1, 0) if WINDOW else 0
    begin, end = least // BLOCK_N, highest // BLOCK_N + 1
    # Blocks from `whole` to `partial` are seen by every token of the tile.
    whole = tl.cdiv(tl.maximum(highest - WINDOW + 1, 0), BLOCK_N) if WINDOW else 0
    partial = tl.maximum((lowest + 1) // BLOCK_N, whole)

    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if WINDOW:
        m, total, acc = _attend(
            q, m, total, acc, begin, tl.minimum(whole, end), position, key_cache, value_cache, key_scales, value_scales,
            k_page_stride, k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, page_table, kv,
            least, length, scale, softcap, NUM_KV, WINDOW, SOFTCAP, FLOAT8_BITS, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D,
            TMA, True,
        )  # fmt: skip
    m, total, acc = _attend(
        q, m, total, acc, whole, partial, position, key_cache, value_cache, key_scales, value_scales, k_page_stride,
        k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, page_table, kv, least, length, scale,
        softcap, NUM_KV, WINDOW, SOFTCAP, FLOAT8_BITS, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, False,
    )  # fmt: skip
    m, total, acc = _attend(
        q, m, total, acc, partial, end, position, key_cache, value_cache, key_scales, value_scales, k_page_stride,
        k_slot_stride, k_head_stride, v_page_stride, v_slot_stride, v_head_stride, page_table, kv, least, length, scale,
        softcap, NUM_KV, WINDOW, SOFTCAP, FLOAT8_BITS, PAGE_SIZE, HEAD_DIM, BLOCK_N, BLOCK_D, TMA, True,
    )  # fmt: skip

    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    if value_scales is not None:
        result *= 1 / LIFT
    place = out + ((first_row + token) * NUM_HEADS + head)[:, None] * HEAD_DIM + d[None, :]
    tl.store(place, result.to(out.dtype.element_ty), mask=present)


class _Shape(NamedTuple):
    """Of tiles: rows of queries, positions of keys; warps, and tiles of keys that are on their way."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def _shape(query: torch.Tensor, head_dim: int, group: int, num_rows: int, arch: int, narrow: bool) -> _Shape:
    """num_rows: of the longest chunk. narrow: whether the caches are in 8 bits, whose widening takes registers. As
    large as registers and shared memory hold without spills, with a window and a soft cap too, by Triton 3.6 and 3.7.
    """
    wide = head_dim > 128
    if query.dtype == torch.float32:
        shape = _Shape(32, 32, 4, 2)
    elif wide and narrow:
        shape = _Shape(32, 32, 4, 2) if arch < 90 else _Shape(64, 16, 8, 2)
    elif arch < 90:
        shape = _Shape(64, 32, 8, 2) if wide or narrow else _Shape(128, 32, 8, 3 if head_dim > 64 else 2)
    elif wide or narrow:
        shape = _Shape(128, 32, 8, 2)
    else:
        shape = _Shape(128, 64, 8, 3)
    if num_rows <= 64 and query.dtype != torch.float32:
        rows = max(16, min(triton.next_power_of_2(num_rows), shape.block_m))
        num_warps = 8 if rows > 32 and (wide or (narrow and arch < 90)) else 4
        block_n = min(rows, shape.block_n) if wide and narrow else shape.block_n
        shape = _Shape(rows, block_n, num_warps, 2)
    return shape._replace(block_m=max(shape.block_m, triton.next_power_of_2(group)))


def _descriptor(cache: torch.Tensor, block_n: int) -> TensorDescriptor | None:
    """Whose blocks are so many slots of a page and one head; None where TMA cannot read the cache so."""
    page_stride, slot_stride, head_stride, step = cache.stride()
    num_pages, page_size, num_kv, head_dim = cache.shape
    strides = [page_stride, head_stride, slot_stride, step]
    if step != 1 or cache.data_ptr() % 16 or any(stride * cache.itemsize % 16 for stride in strides[:3]):
        return None
    block = [1, 1, block_n, triton.next_power_of_2(head_dim)]
    return TensorDescriptor(cache, [num_pages, num_kv, page_size, head_dim], strides, block)


def _nothing(*args: object, **options: object) -> None:
    """Of what only writes into its arguments."""


@operator(fake=_nothing, mutates=("out",))
def prefill_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sequences: torch.Tensor,
    pages: torch.Tensor,
    head_table: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    *,
    group: int,
    scale: float,
    window: int,
    logit_softcap: float,
    most_new: int,
) -> None:
    """Writes the rows of `out` [T, N, D] that are the sequences' new tokens.

    most_new: most new tokens of a sequence. The rest: as for `decode_attention`, but for any number of new tokens.
    """
    query = with_heads_together(query)
    page_size, num_kv, head_dim = key_cache.shape[1:]
    arch = target_of(query).arch
    keys: torch.Tensor | TensorDescriptor
    values: torch.Tensor | TensorDescriptor
    keys, float8_bits = as_read(key_cache, arch)
    values, _ = as_read(value_cache, arch)
    shape = _shape(query, head_dim, group, most_new * group, arch, key_cache.itemsize == 1)
    tma = False
    if arch >= 90 and head_dim <= 128 and page_size % shape.block_n == 0 and query.dtype != torch.float32:
        described = _descriptor(keys, shape.block_n), _descriptor(values, shape.block_n)
        tma = None not in described
    strides = (*keys.stride()[:3], *values.stride()[:3])
    if tma:
        shape = shape._replace(num_stages=2)
        keys, values = described
    grid = (-(-most_new // (shape.block_m // group)), num_kv, len(sequences))
    _prefill_kernel[grid](
        out, query, keys, values, sequences, pages, head_table, key_scales, value_scales, query.stride(0), *strides,
        *exponents(scale, logit_softcap),
        NUM_HEADS=out.shape[1], NUM_KV=num_kv, GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, WINDOW=window,
        SOFTCAP=logit_softcap != 0, FLOAT8_BITS=float8_bits, TMA=tma, BLOCK_M=shape.block_m, BLOCK_N=shape.block_n,
        BLOCK_D=triton.next_power_of_2(head_dim), num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip


def _example(
    dtype: torch.dtype, *, head_dim: int = 128, page_size: int = 16, most_new: int = 2048, bounded: bool = False
) -> None:
    """4 chunks, 32 query heads over 8. bounded: by a window and a soft cap."""
    cache = meta(512, page_size, 8, head_dim, dtype=dtype)
    scales = (meta(512, 8, page_size),) * 2 if dtype.itemsize == 1 else (None, None)
    out = meta(4 * most_new, 32, head_dim, dtype=torch.bfloat16)
    sequences, pages = meta(4, 4, dtype=torch.int32), meta(4096, dtype=torch.int32)
    prefill_attention(
        out, out, cache, cache, sequences, pages, None, *scales, group=4, scale=0.1, window=4096 if bounded else 0,
        logit_softcap=50.0 if bounded else 0.0, most_new=most_new,
    )  # fmt: skip


_WGMMA, _TMA = ("wgmma",), ("wgmma", "tma")

EXAMPLES = (
    Example("bf16 d128", lambda: _example(torch.bfloat16), instructions=_WGMMA),
    Example("bf16 d128 pages of 64", lambda: _example(torch.bfloat16, page_size=64), (90,), _TMA),
    Example("bf16 d128 short", lambda: _example(torch.bfloat16, page_size=64, most_new=16), instructions=_TMA),
    Example("bf16 d64 bounded", lambda: _example(torch.bfloat16, head_dim=64, page_size=64, bounded=True)),
    Example("bf16 d256 bounded", lambda: _example(torch.bfloat16, head_dim=256, bounded=True), instructions=_WGMMA),
    Example("bf16 d256 short bounded", lambda: _example(torch.bfloat16, head_dim=256, most_new=16, bounded=True)),
    Example("fp8 d128 bounded", lambda: _example(FLOAT8, page_size=64, bounded=True), instructions=_TMA),
    Example("fp8 d256 bounded", lambda: _example(FLOAT8, head_dim=256, bounded=True), instructions=_WGMMA),
    Example("int8 d128", lambda: _example(torch.int8), instructions=_WGMMA),
    Example("int8 d128 pages of 64", lambda: _example(torch.int8, page_size=64), (90,), _TMA),
    Example("int8 d128 short bounded", lambda: _example(torch.int8, page_size=64, most_new=16, bounded=True)),
)
