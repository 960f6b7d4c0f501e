"""`rope_and_write_kv`: what lies between the product that makes queries, keys and values, and attention.

Shapes: T tokens of a step, N query heads and K KV heads of a rank, D head dimension.
"""

from __future__ import annotations

import torch

from phalanx.kernels import native_cpu, triton_gpu
from phalanx.kernels.rms_norm import rms_norm
from phalanx.kernels.rope import rope


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Stores keys and values [T, kv_heads, head_dim] at `slots` [T] (page * page_size + offset) of the caches.

    key_cache, value_cache: [pages, page_size, kv_heads, head_dim], whose first two dimensions can be viewed as one.
    """
    key_cache.view(-1, *keys.shape[1:]).index_copy_(0, slots, keys)
    value_cache.view(-1, *values.shape[1:]).index_copy_(0, slots, values)


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
) -> torch.Tensor:
    """Queries [T, N, D], rotated; keys, rotated, and values are stored at `slots` [T] of the caches.

    qkv: [T, (N + 2 K) * D], the heads of queries, keys and values one after another. It may be overwritten, and the
    queries may be a view of it. table: cosines and sines, [T, 1, D] each, as `rope_table` makes them. key_cache,
    value_cache: as for `write_kv`. q_norm, k_norm: [D], for an `rms_norm` of each head before it is rotated, with
    `eps`. All of one dtype, but slots, int64.
    """
    gpu = triton_gpu.operators_for(qkv)
    if gpu is not None:
        return gpu.rope_and_write_kv(  # type: ignore[no-any-return]
            qkv, *table, key_cache, value_cache, slots, q_norm, k_norm, eps
        )
    num_kv, head_dim = key_cache.shape[2:]
    num_tokens = qkv.shape[0]
    num_queries = qkv.shape[1] // head_dim - 2 * num_kv
    code = native_cpu.code_of(qkv)
    strides = key_cache.stride()
    if code is None or not qkv.is_contiguous() or value_cache.stride() != strides or strides[3] != 1:
        heads = qkv.view(num_tokens, -1, head_dim)
        q_TND, k_TKD, v_TKD = torch.split(heads, [num_queries, num_kv, num_kv], dim=1)
        if q_norm is not None:
            q_TND = rms_norm(q_TND, q_norm, eps)
        if k_norm is not None:
            k_TKD = rms_norm(k_TKD, k_norm, eps)
        write_kv(rope(k_TKD, *table), v_TKD, key_cache, value_cache, slots)
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
        slots.data_ptr(),
        key_cache.shape[1],
        *strides[:3],
        num_tokens,
        num_queries,
        num_kv,
        head_dim,
        code,
    )
    return qkv.view(num_tokens, -1, head_dim)[:, :num_queries]
