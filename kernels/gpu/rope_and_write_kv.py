"""`rope_and_write_kv`: heads normalised, rotated (Su et al. 2021, arXiv 2104.09864), and stored where they belong.

(low, high) of a head -> (low cos - high sin, high cos + low sin): in float32, and rounded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from phalanx.kernels.gpu.attention_parts import FLOAT8, as_read, narrowed, scale_of
from phalanx.kernels.gpu.example import Example, meta
from phalanx.kernels.gpu.operator import operator
from phalanx.kernels.gpu.target import target_of

_TILE = 1024  # numbers that a program takes


@triton.jit
def _table_at(table, at, HALF: tl.constexpr):
    return tl.load(table + at, mask=at < HALF, other=0.0).to(tl.float32)


@triton.jit
def _rope_and_write_kv_kernel(
    queries,
    key_cache,
    value_cache,
    qkv,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    key_scales,
    value_scales,
    qkv_stride,
    cos_stride,
    sin_stride,
    k_page_stride,
    k_place_stride,
    k_head_stride,
    v_page_stride,
    v_place_stride,
    v_head_stride,
    page_size,
    eps,
    NUM_QUERIES: tl.constexpr,
    NUM_KV: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    FLOAT8_BITS: tl.constexpr,
):
    """A program some heads of a token: of queries, keys and values, as they lie in `qkv`."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, HALF_BLOCK)[None, :]
    inside = (head < NUM_QUERIES + 2 * NUM_KV) & (at < HALF)
    is_query = head < NUM_QUERIES
    is_value = head >= NUM_QUERIES + NUM_KV
    source = qkv + token * qkv_stride + head * HEAD_DIM + at
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)

    turned_low, turned_high = low, high
    if q_norm is not None or k_norm is not None:
        scale = tl.rsqrt((tl.sum(low * low, 1) + tl.sum(high * high, 1)) / HEAD_DIM + eps)[:, None]
        if q_norm is not None:
            gain_low = tl.load(q_norm + at, mask=at < HALF, other=0.0).to(tl.float32)
            gain_high = tl.load(q_norm + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)
            turned_low = tl.where(is_query, low * scale * gain_low, turned_low)
            turned_high = tl.where(is_query, high * scale * gain_high, turned_high)
        if k_norm is not None:
            gain_low = tl.load(k_norm + at, mask=at < HALF, other=0.0).to(tl.float32)
            gain_high = tl.load(k_norm + HALF + at, mask=at < HALF, other=0.0).to(tl.float32)
            turned_low = tl.where(is_query, turned_low, low * scale * gain_low)
            turned_high = tl.where(is_query, turned_high, high * scale * gain_high)
    rotated_low = turned_low * _table_at(cos + token * cos_stride, at, HALF)
    rotated_low -= turned_high * _table_at(sin + token * sin_stride, at, HALF)
    rotated_high = turned_high * _table_at(cos + token * cos_stride + HALF, at, HALF)
    rotated_high += turned_low * _table_at(sin + token * sin_stride + HALF, at, HALF)

    query = queries + (token * NUM_QUERIES + head) * HEAD_DIM + at
    tl.store(query, rotated_low.to(queries.dtype.element_ty), mask=inside & is_query)
    tl.store(query + HALF, rotated_high.to(queries.dtype.element_ty), mask=inside & is_query)
    slot = tl.load(slots + token)
    page, place = slot // page_size, slot % page_size
    stored = inside & (slot >= 0)
    key = key_cache + page * k_page_stride + place * k_place_stride + (head - NUM_QUERIES) * k_head_stride + at
    is_key = stored & (head >= NUM_QUERIES) & (head < NUM_QUERIES + NUM_KV)
    if key_scales is not None:
        # Of what the definition narrows: rounded to the model's dtype.
        rotated_low = rotated_low.to(qkv.dtype.element_ty).to(tl.float32)
        rotated_high = rotated_high.to(qkv.dtype.element_ty).to(tl.float32)
        is_number = at < HALF
        amax = tl.max(tl.where(is_number, tl.maximum(tl.abs(rotated_low), tl.abs(rotated_high)), 0.0), 1)[:, None]
        key_scale = scale_of(amax, key_cache.dtype.element_ty)
        amax = tl.max(tl.where(is_number, tl.maximum(tl.abs(low), tl.abs(high)), 0.0), 1)[:, None]
        value_scale = scale_of(amax, value_cache.dtype.element_ty)
        first = at == 0
        at_scale = (page * NUM_KV + head - NUM_QUERIES) * page_size + place + at
        tl.store(key_scales + at_scale, key_scale.to(tl.bfloat16), mask=is_key & first)
        at_scale -= NUM_KV * page_size
        tl.store(value_scales + at_scale, value_scale.to(tl.bfloat16), mask=stored & is_value & first)
        rotated_low *= 1 / key_scale
        rotated_high *= 1 / key_scale
        low *= 1 / value_scale
        high *= 1 / value_scale
    tl.store(key, narrowed(rotated_low, key_cache.dtype.element_ty, FLOAT8_BITS), mask=is_key)
    tl.store(key + HALF, narrowed(rotated_high, key_cache.dtype.element_ty, FLOAT8_BITS), mask=is_key)
    value = value_cache + page * v_page_stride + place * v_place_stride
    value += (head - NUM_QUERIES - NUM_KV) * v_head_stride + at
    tl.store(value, narrowed(low, value_cache.dtype.element_ty, FLOAT8_BITS), mask=stored & is_value)
    tl.store(value + HALF, narrowed(high, value_cache.dtype.element_ty, FLOAT8_BITS), mask=stored & is_value)


def _fake(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    num_kv, head_dim = key_cache.shape[2:]
    return qkv.new_empty((qkv.shape[0], qkv.shape[1] // head_dim - 2 * num_kv, head_dim))


@operator(fake=_fake, mutates=("key_cache", "value_cache", "key_scales", "value_scales"))
def rope_and_write_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `phalanx.kernels.rope_and_write_kv`, which calls it. cos, sin: [T, 1, D]. A negative slot stores nothing.
    Numbers of a head lie side by side in the caches, and their scales are contiguous.
    """
    queries = _fake(qkv, cos, sin, key_cache, value_cache, slots, q_norm, k_norm, eps)
    num_kv, head_dim = key_cache.shape[2:]
    if not qkv.numel():
        return queries
    if qkv.stride(1) != 1:
        qkv = qkv.contiguous()
    arch = target_of(qkv).arch
    keys, float8_bits = as_read(key_cache, arch)
    values, _ = as_read(value_cache, arch)
    half_block = triton.next_power_of_2(head_dim // 2)
    heads = min(max(1, _TILE // (2 * half_block)), triton.next_power_of_2(queries.shape[1] + 2 * num_kv))
    grid = (qkv.shape[0], triton.cdiv(queries.shape[1] + 2 * num_kv, heads))
    _rope_and_write_kv_kernel[grid](
        queries,
        keys,
        values,
        qkv,
        cos,
        sin,
        slots,
        q_norm,
        k_norm,
        key_scales,
        value_scales,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        *key_cache.stride()[:3],
        *value_cache.stride()[:3],
        key_cache.shape[1],
        eps,
        NUM_QUERIES=queries.shape[1],
        NUM_KV=num_kv,
        HEAD_DIM=head_dim,
        HALF_BLOCK=half_block,
        HEADS=heads,
        FLOAT8_BITS=float8_bits,
        num_warps=4,
    )
    return queries


def _example(
    queries: int, keys: int, head_dim: int, *, norms: bool, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    cache = meta(64, 16, keys, head_dim, dtype=dtype)
    scales = (meta(64, keys, 16),) * 2 if dtype.itemsize == 1 else (None, None)
    table = meta(32, 1, head_dim)
    norm = meta(head_dim) if norms else None
    qkv = meta(32, (queries + 2 * keys) * head_dim)
    return rope_and_write_kv(qkv, table, table, cache, cache, meta(32, dtype=torch.int64), norm, norm, 1e-6, *scales)


EXAMPLES = (
    Example("bf16 32 over 8 heads of 128", lambda: _example(32, 8, 128, norms=False)),
    Example("bf16 9 over 3 heads of 64", lambda: _example(9, 3, 64, norms=False)),
    Example("bf16 16 over 8 heads of 128, normalised", lambda: _example(16, 8, 128, norms=True)),
    Example("into int8, 32 over 8 heads of 128", lambda: _example(32, 8, 128, norms=False, dtype=torch.int8)),
    Example("into fp8, 32 over 8 heads of 128", lambda: _example(32, 8, 128, norms=True, dtype=FLOAT8)),
)
