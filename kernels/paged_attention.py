"""`paged_attention`: causal attention of many sequences over a KV cache kept in pages (Kwon et al. 2023, arXiv
2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def write_kv(
    keys: torch.Tensor, values: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, slots: torch.Tensor
) -> None:
    """Stores keys and values [T, kv_heads, head_dim] at `slots` [T] (page * page_size + offset) of the caches.

    key_cache, value_cache: [pages, page_size, kv_heads, head_dim].
    """
    key_cache.view(-1, *keys.shape[1:]).index_copy_(0, slots, keys)
    value_cache.view(-1, *values.shape[1:]).index_copy_(0, slots, values)


def paged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    page_tables: Sequence[torch.Tensor],
    query_starts: Sequence[int],
    context_lengths: Sequence[int],
    kv_of_query: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Attention of each sequence's new tokens over all of its tokens so far, the new ones included.

    query: [T, query_heads, head_dim], the sequences one after another. key_cache, value_cache: [pages, page_size,
    kv_heads, head_dim]; new keys and values are already written. page_tables: one int64 tensor a sequence, its pages in
    order. query_starts: row of each sequence's first query, then T. context_lengths: tokens of each sequence, new ones
    included. kv_of_query: [query_heads] int64, the KV head of each query head; groups may be unequal, since a rank may
    hold part of one. window: a token sees this many positions back, itself included, or all.
    Returns [T, query_heads, head_dim].
    """
    outputs = []
    page_size = key_cache.shape[1]
    for pages, start, stop, length in zip(page_tables, query_starts, query_starts[1:], context_lengths, strict=False):
        num_pages = -(-length // page_size)
        keys = key_cache[pages[:num_pages]].flatten(0, 1)[:length, kv_of_query]
        values = value_cache[pages[:num_pages]].flatten(0, 1)[:length, kv_of_query]
        mask = _causal_mask(stop - start, length, window, query.device)
        output = F.scaled_dot_product_attention(
            query[start:stop].transpose(0, 1).unsqueeze(0),
            keys.transpose(0, 1).unsqueeze(0),
            values.transpose(0, 1).unsqueeze(0),
            attn_mask=mask,
            scale=scale,
        )
        outputs.append(output.squeeze(0).transpose(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _causal_mask(num_queries: int, length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[num_queries, length] of what each of the last `num_queries` positions sees, or None if that is everything."""
    if num_queries == 1 and (window is None or length <= window):
        return None
    key = torch.arange(length, device=device)
    query = key[length - num_queries :, None]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)
