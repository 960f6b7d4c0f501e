"""`rope_and_write_kv`: what lies between the product that makes queries, keys and values, and attention.

Shapes: T tokens of a step, N query heads and K KV heads of a rank, D head dimension.
"""

from __future__ import annotations

import torch

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.kv_format import KVScales, as_bytes, check_scales, native_scales, quantise_kv
from phalanx.kernels.rms_norm import rms_norm
from phalanx.kernels.rope import rope


def write_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    kv_scales: KVScales | None = None,
) -> None:
    """Stores keys and values [T, kv_heads, head_dim] at `slots` [T] (page * page_size + offset) of the caches.

    key_cache, value_cache: [pages, page_size, kv_heads, head_dim], whose first two dimensions can be viewed as one; of
    the dtype of keys and values, or in 8 bits with kv_scales, as `quantise_kv` makes them.
    """
    check_scales(key_cache, kv_scales)
    page_size = key_cache.shape[1]
    key_scales, value_scales = kv_scales or (None, None)
    for x_TKD, cache, scales in ((keys, key_cache, key_scales), (values, value_cache, value_scales)):
        written_TKD = x_TKD
        if scales is not None:
            written_TKD, scales_TK = quantise_kv(x_TKD, cache.dtype)
            scales[slots // page_size, :, slots % page_size] = scales_TK
        as_bytes(cache).view(-1, *x_TKD.shape[1:]).index_copy_(0, slots, as_bytes(written_TKD))


def rope_and_write_kv(
    qkv: torch.Tensor,
    table: tuple[torch.Tensor, torch.Tensor],
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """Queries [T, N, D], rotated; keys, rotated, and values are stored at `slots` [T] of the caches.

    qkv: [T, (N + 2 K) * D], the heads of queries, keys and values one after another. It may be overwritten, and the
    queries may be a view of it. table: cosines and sines, [T, 1, D] each, as `rope_table` makes them. key_cache,
    value_cache, kv_scales: as for `write_kv`. q_norm, k_norm: [D], for an `rms_norm` of each head before it is rotated,
    with `eps`. All of one dtype, but slots, int64, and caches in 8 bits.
    """
    check_scales(key_cache, kv_scales)
    gpu = triton_gpu.operators_for(qkv)
    if gpu is not None:
        return gpu.rope_and_write_kv(  # type: ignore[no-any-return]
            qkv, *table, key_cache, value_cache, slots, q_norm, k_norm, eps, *(kv_scales or (None, None))
        )
    num_kv, head_dim = key_cache.shape[2:]
    num_tokens = qkv.shape[0]
    num_queries = qkv.shape[1] // head_dim - 2 * num_kv
    code = native_cpu.code_of(qkv)
    strides = key_cache.stride()
    scales = native_scales(key_cache, kv_scales)
    alike = value_cache.stride() == strides and strides[3] == 1
    if code is None or not qkv.is_contiguous() or not alike or scales is None:
        heads = qkv.view(num_tokens, -1, head_dim)
        q_TND, k_TKD, v_TKD = torch.split(heads, [num_queries, num_kv, num_kv], dim=1)
        if q_norm is not None:
            q_TND = rms_norm(q_TND, q_norm, eps)
        if k_norm is not None:
            k_TKD = rms_norm(k_TKD, k_norm, eps)
        write_kv(rope(k_TKD, *table), v_TKD, key_cache, value_cache, slots, kv_scales)
        return rope(q_TND, *table)
    cos, sin = table
    native_cpu.LIBRARY.rope_and_write_kv(
        qkv.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        eps,
        key_cache.data_ptr(),
        value_cache.data_ptr(),
        scales.keys,
        scales.values,
        slots.data_ptr(),
        key_cache.shape[1],
        *strides[:3],
        num_tokens,
        num_queries,
        num_kv,
        head_dim,
        code,
        scales.pages,
    )
    return qkv.view(num_tokens, -1, head_dim)[:, :num_queries]
