"""Attention of one new token a sequence over pages of keys and values, in one launch.

The positions of a sequence are divided over several programs (Flash-Decoding: Dao, Haziza, Massa and Sizov 2023,
pytorch.org/blog/flash-decoding). Each leaves its share of the weighted sum in memory and counts itself; the last that
comes adds the shares up and sets the counter back, so that no second launch is needed and a CUDA graph can replay this
one. The query heads that share a KV head are the rows of one tile, so that its keys are read once.

`decode_attention` takes queries, and keys and values in their pages. `rope_and_decode` takes what the product before
attention made: the program that comes to a sequence's new token rotates its key, attends to it, and writes it.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.attention_parts import (
    FIELDS,
    FLOAT8,
    LIFT,
    as_read,
    bent,
    exponents,
    heads_of,
    narrowed,
    rotated,
    scale_of,
    scales_at,
    softmax_step,
    widened,
    with_heads_together,
)
from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.target import target_of

MOST_SPLITS = 64


@triton.jit
def _decode_kernel(
    out, query, key_cache, value_cache, sequences, pages, counters, shares, sums, head_table, key_scales, value_scales,
    cos, sin, q_norm, k_norm, query_stride, k_page_stride, k_slot_stride, k_head_stride, v_page_stride, v_slot_stride,
    v_head_stride, scale, softcap, eps,
    NUM_HEADS: tl.constexpr, NUM_KV: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT8_BITS: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program a split, a KV head and a sequence. SPLITS: most that a sequence is divided into.

    shares: [sequences, NUM_KV, SPLITS, GROUP, HEAD_DIM] and sums: [.., GROUP, 2] float32, for what programs leave.
    WINDOW: 0 for none. cos, sin: of the tokens, whose keys and values then stand behind their heads in `query`; None
    where the keys and values are in their pages. head_table, scales, norms: None where there are none.
    """
    split, kv, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(sequences + sequence * FIELDS).to(tl.int64)
    if tl.load(sequences + sequence * FIELDS + 1) == 0:
        return  # a place without a sequence
    length = tl.load(sequences + sequence * FIELDS + 2)
    page_table = pages + tl.load(sequences + sequence * FIELDS + 3)

    first = tl.maximum(length - WINDOW, 0) if WINDOW else 0
    stop = length - 1 if cos is not None else length  # of what is read from pages
    num_blocks = tl.cdiv(tl.maximum(stop, first), BLOCK_N) - first // BLOCK_N
    split_blocks = tl.maximum(tl.cdiv(num_blocks, SPLITS), 1)
    num_splits = tl.maximum(tl.cdiv(num_blocks, split_blocks), 1)
    if split >= num_splits:
        return

    g, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    head = heads_of(head_table, kv, g, GROUP)[:, None]
    inside_d = (d < HEAD_DIM)[None, :]
    dtype = query.dtype.element_ty
    heads = query + row * query_stride + head * HEAD_DIM
    if cos is not None:
        q = rotated(heads, head >= 0, cos + row * HEAD_DIM, sin + row * HEAD_DIM, q_norm, eps, HEAD_DIM, BLOCK_D)
        q = q.to(dtype)
    else:
        q = tl.load(heads + d[None, :], mask=(head >= 0) & inside_d, other=0.0)
    m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if cos is not None:
        if split == num_splits - 1:
            new = query + row * query_stride + (NUM_HEADS + kv + tl.arange(0, 1)[:, None]) * HEAD_DIM
            present = tl.full((1, 1), True, tl.int1)
            k = rotated(new, present, cos + row * HEAD_DIM, sin + row * HEAD_DIM, k_norm, eps, HEAD_DIM, BLOCK_D)
            v = tl.load(new + NUM_KV * HEAD_DIM + d[None, :], mask=inside_d, other=0.0).to(tl.float32)
            page = tl.load(page_table + (length - 1) // PAGE_SIZE).to(tl.int64)
            slot = (length - 1) % PAGE_SIZE
            k_scale, v_scale = 1.0, 1.0
            if key_scales is not None:
                k_scale = scale_of(tl.max(tl.abs(k)), key_cache.dtype.element_ty)
                v_scale = scale_of(tl.max(tl.abs(v)), value_cache.dtype.element_ty)
                at_scale = (page * NUM_KV + kv) * PAGE_SIZE + slot
                tl.store(key_scales + at_scale, k_scale.to(tl.bfloat16))
                tl.store(value_scales + at_scale, v_scale.to(tl.bfloat16))
                k *= 1 / k_scale
                v *= 1 / v_scale
                v_scale *= LIFT
            k = narrowed(k, key_cache.dtype.element_ty, FLOAT8_BITS)
            v = narrowed(v, value_cache.dtype.element_ty, FLOAT8_BITS)
            k_place = key_cache + page * k_page_stride + slot * k_slot_stride + kv * k_head_stride
            v_place = value_cache + page * v_page_stride + slot * v_slot_stride + kv * v_head_stride
            tl.store(k_place + d[None, :], k, mask=inside_d)
            tl.store(v_place + d[None, :], v, mask=inside_d)
            product = tl.sum(q.to(tl.float32) * widened(k, tl.float32, FLOAT8_BITS), 1) * k_scale
            m = bent(product, scale, softcap, SOFTCAP)
            total += 1.0
            acc += widened(v, tl.float32, FLOAT8_BITS) * v_scale

    begin = first // BLOCK_N + split * split_blocks
    end = tl.minimum(begin + split_blocks, first // BLOCK_N + num_blocks)
    for block in tl.range(begin, end):
        n = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (n >= first) & (n < stop)
        page = tl.load(page_table + n // PAGE_SIZE, mask=inside, other=0).to(tl.int64)
        at = page * k_page_stride + (n % PAGE_SIZE) * k_slot_stride + kv * k_head_stride
        k = tl.load(key_cache + at[:, None] + d[None, :], mask=inside[:, None] & inside_d, other=0.0)
        at = page * v_page_stride + (n % PAGE_SIZE) * v_slot_stride + kv * v_head_stride
        v = tl.load(value_cache + at[:, None] + d[None, :], mask=inside[:, None] & inside_d, other=0.0)
        products = tl.dot(q, tl.trans(widened(k, dtype, FLOAT8_BITS)), input_precision="ieee")
        if key_scales is not None:
            products *= scales_at(key_scales, page, kv, n % PAGE_SIZE, inside, NUM_KV, PAGE_SIZE)[None, :]
        scores = tl.where(inside[None, :], bent(products, scale, softcap, SOFTCAP), -float("inf"))
        weights, m, total, acc = softmax_step(scores, m, total, acc)
        if value_scales is not None:
            weights *= scales_at(value_scales, page, kv, n % PAGE_SIZE, inside, NUM_KV, PAGE_SIZE)[None, :] * LIFT
        acc = tl.dot(weights.to(dtype), widened(v, dtype, FLOAT8_BITS), acc, input_precision="ieee")

    last = num_splits == 1
    if not last:
        own = (sequence * NUM_KV + kv) * SPLITS
        place = ((own + split) * GROUP + g)[:, None]
        tl.store(shares + place * HEAD_DIM + d[None, :], acc, mask=(g < GROUP)[:, None] & inside_d)
        tl.store(sums + place * 2, m[:, None], mask=(g < GROUP)[:, None])
        tl.store(sums + place * 2 + 1, total[:, None], mask=(g < GROUP)[:, None])
        tl.debug_barrier()  # all of this program's before it counts itself
        counter = counters + sequence * NUM_KV + kv
        last = tl.atomic_add(counter, 1, sem="acq_rel") == num_splits - 1
        if last:
            tl.store(counter, 0)
            m = tl.full((BLOCK_M,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for other in tl.range(0, num_splits):
                # Past the first cache, which is not coherent with what other programs write.
                left = (own + other) * GROUP + g
                share = shares + left[:, None] * HEAD_DIM + d[None, :]
                share = tl.load(share, mask=(g < GROUP)[:, None] & inside_d, other=0.0, cache_modifier=".cg")
                m_other = tl.load(sums + left * 2, mask=g < GROUP, other=-float("inf"), cache_modifier=".cg")
                total_other = tl.load(sums + left * 2 + 1, mask=g < GROUP, other=0.0, cache_modifier=".cg")
                m_new = tl.maximum(m, m_other)
                shift = tl.where(m_new == -float("inf"), 0.0, m_new)
                kept, taken = tl.exp2(m - shift), tl.exp2(m_other - shift)
                total = total * kept + total_other * taken
                acc = acc * kept[:, None] + share * taken[:, None]
                m = m_new
    if last:
        result = acc / tl.where(total == 0, 1.0, total)[:, None]
        if value_scales is not None:
            result *= 1 / LIFT
        place = out + (row * NUM_HEADS + head) * HEAD_DIM + d[None, :]
        tl.store(place, result.to(out.dtype.element_ty), mask=(head >= 0) & inside_d)


def _launch(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sequences: torch.Tensor,
    pages: torch.Tensor,
    counters: torch.Tensor,
    head_table: torch.Tensor | None,
    scales: tuple[torch.Tensor | None, torch.Tensor | None],
    rotation: tuple[torch.Tensor | None, ...],
    *,
    group: int,
    scale: float,
    eps: float,
    window: int,
    logit_softcap: float,
    longest: int,
) -> None:
    """rotation: cosines, sines and the weights of the two norms, each None where there is none. query: [T, .], rows of
    heads one after another.
    """
    page_size, num_kv, head_dim = key_cache.shape[1:]
    num_sequences = len(sequences)
    target = target_of(query)
    block_n = _block_n(key_cache, head_dim)
    splits = choose_splits(num_sequences * num_kv, longest, block_n, target.num_sms)
    keys, float8_bits = as_read(key_cache, target.arch)
    values, _ = as_read(value_cache, target.arch)
    shares = sums = None
    if splits > 1:
        num_rows = num_sequences * num_kv * splits * group
        shares = query.new_empty((num_rows, head_dim), dtype=torch.float32)
        sums = query.new_empty((num_rows, 2), dtype=torch.float32)
    _decode_kernel[(splits, num_kv, num_sequences)](
        out, query, keys, values, sequences, pages, counters, shares, sums, head_table, *scales, *rotation,
        query.stride(0), *keys.stride()[:3], *values.stride()[:3], *exponents(scale, logit_softcap), eps,
        NUM_HEADS=out.shape[1], NUM_KV=num_kv, GROUP=group, HEAD_DIM=head_dim, PAGE_SIZE=page_size, WINDOW=window,
        SOFTCAP=logit_softcap != 0, FLOAT8_BITS=float8_bits, SPLITS=splits,
        BLOCK_M=max(16, triton.next_power_of_2(group)), BLOCK_N=block_n, BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=8 if query.dtype == torch.float32 else 4, num_stages=5,  # half of them for the numbers of pages
    )  # fmt: skip


def _block_n(cache: torch.Tensor, head_dim: int) -> int:
    """At most 16 KiB of keys, so that several programs fit on a multiprocessor with two tiles on their way each; 8 bits
    count as the 16 that they become in registers.
    """
    return int(min(64, max(16, 16384 // (triton.next_power_of_2(head_dim) * max(2, cache.itemsize)))))


def choose_splits(num_programs: int, longest: int, block_n: int, num_sms: int) -> int:
    """Programs that a sequence is divided over: enough for two on each multiprocessor, each with two tiles or more.

    num_programs: without a division. longest: most positions of a sequence.
    """
    return max(1, min(-(-2 * num_sms // num_programs), -(-longest // (2 * block_n)), MOST_SPLITS))


def _nothing(*args: object, **options: object) -> None:
    """Of what only writes into its arguments."""


@operator(fake=_nothing, mutates=("out", "counters"))
def decode_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sequences: torch.Tensor,
    pages: torch.Tensor,
    counters: torch.Tensor,
    head_table: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    *,
    group: int,
    scale: float,
    window: int,
    logit_softcap: float,
    longest: int,
) -> None:
    """Writes the rows of `out` [T, N, D] that are the sequences' new tokens.

    query: [T, N, D]. key_cache, value_cache: [pages, page_size, K, D] in its dtype, or int8 or e4m3 with key_scales and
    value_scales [pages, K, page_size] bfloat16, by which they are multiplied, contiguous. sequences, pages: of a
    `DevicePlan`, one new token each. counters: at least [S * K] int32, zero. head_table, group: of `HeadGroups`.
    window, logit_softcap: 0 for none. longest: most positions that a sequence attends to, of which the launch's grid is
    made.
    """
    query = with_heads_together(query)
    _launch(
        out, query, key_cache, value_cache, sequences, pages, counters, head_table, (key_scales, value_scales),
        (None, None, None, None), group=group, scale=scale, eps=0.0, window=window, logit_softcap=logit_softcap,
        longest=longest,
    )  # fmt: skip


@operator(fake=_nothing, mutates=("out", "key_cache", "value_cache", "counters", "key_scales", "value_scales"))
def rope_and_decode(
    out: torch.Tensor,
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    sequences: torch.Tensor,
    pages: torch.Tensor,
    counters: torch.Tensor,
    head_table: torch.Tensor | None,
    key_scales: torch.Tensor | None,
    value_scales: torch.Tensor | None,
    *,
    group: int,
    scale: float,
    eps: float,
    window: int,
    logit_softcap: float,
    longest: int,
) -> None:
    """`rope_and_write_kv`, then `decode_attention`, whose arguments they are. qkv: [T, (N + 2 K) * D]."""
    _launch(
        out, qkv, key_cache, value_cache, sequences, pages, counters, head_table, (key_scales, value_scales),
        (cos, sin, q_norm, k_norm), group=group, scale=scale, eps=eps, window=window, logit_softcap=logit_softcap,
        longest=longest,
    )  # fmt: skip


def _example(dtype: torch.dtype, head_dim: int = 128, uneven: bool = False, fused: bool = False) -> None:
    """16 sequences of up to 4096 tokens, 32 query heads over 8."""
    cache = meta(128, 64, 8, head_dim, dtype=dtype)
    scales = (meta(128, 8, 64),) * 2 if dtype.itemsize == 1 else (None, None)
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    out = meta(16, 32, head_dim, dtype=dtype)
    integers = partial(meta, dtype=torch.int32)
    table = integers(8, 5) if uneven else None
    numbers = (integers(16, 4), integers(4096), integers(128), table, *scales)
    group = 5 if uneven else 4
    if fused:
        qkv, angles = meta(16, 48 * head_dim, dtype=dtype), meta(16, 1, head_dim, dtype=dtype)
        rope_and_decode(
            out, qkv, angles, angles, None, None, cache, cache, *numbers, group=group, scale=0.1, eps=0.0, window=0,
            logit_softcap=0.0, longest=4096,
        )  # fmt: skip
    else:
        decode_attention(
            out, out, cache, cache, *numbers, group=group, scale=0.1, window=0, logit_softcap=0.0, longest=4096
        )


EXAMPLES = (
    Example("bf16 d128", lambda: _example(torch.bfloat16)),
    Example("bf16 d128 fused", lambda: _example(torch.bfloat16, fused=True)),
    Example("fp8 d128 fused", lambda: _example(FLOAT8, fused=True)),
    Example("int8 d128", lambda: _example(torch.int8)),
    Example("int8 d128 fused", lambda: _example(torch.int8, fused=True)),
    Example("int8 d256 fused", lambda: _example(torch.int8, head_dim=256, fused=True)),
    Example("fp32 d256", lambda: _example(torch.float32, head_dim=256)),
    Example("bf16 d256 uneven", lambda: _example(torch.bfloat16, head_dim=256, uneven=True)),
)
