"""Paged attention by gathering the pages and PyTorch's attention over what was gathered: on any device.

Shapes: T tokens of a step, S sequences, B sequences of a block, P pages a sequence, L positions attended, N query heads
and K KV heads of a rank, G query heads a KV head, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from phalanx.kernels.head_groups import HeadGroups
from phalanx.kernels.kv_format import KVScales, as_bytes, dequantise_kv, scales_of_slots

# Gathered keys and values of a block should still be in a core's cache when they are read: on a CPU with 1 MiB of L2,
# 32 contexts of 1024 tokens take 1.5 times as long in one block. In blocks of 1024 the calls weigh more than is saved.
BLOCK_TOKENS = 2048


class DecodeBlock(NamedTuple):
    """Sequences with one new token each, computed together.

    rows: of their tokens in the step. pages: [B * P] int64. span: of the P * page_size gathered positions, those that
    any of them attends to. blank: [..] int64, those of all B * P * page_size that nothing may be read from. mask:
    [B, 1, 1, L] float32, to be added to the scores. A block of one sequence has its exact span, and neither of the two.
    """

    num_sequences: int
    rows: slice | torch.Tensor
    pages: torch.Tensor
    span: slice
    blank: torch.Tensor | None
    mask: torch.Tensor | None


class Chunk(NamedTuple):
    """One sequence with several new tokens, T here.

    rows: of its tokens in the step. pages: [P] int64. span: of the P * page_size gathered positions, those attended to.
    mask: [T, L] float32, to be added to the scores, or None for plain causal attention of the T tokens over themselves.
    """

    rows: slice
    pages: torch.Tensor
    span: slice
    mask: torch.Tensor | None


class GatherPlan(NamedTuple):
    """Who attends to what in a step; the same in every layer."""

    decodes: tuple[DecodeBlock, ...]
    chunks: tuple[Chunk, ...]


def plan_gathers(
    page_tables: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    *,
    page_size: int,
    window: int | None,
    device: torch.device,
) -> GatherPlan:
    """As `plan_attention`, whose arguments they are; the plan's tensors are on `device`."""
    decodes, chunks = [], []
    row = 0
    for sequence, (num_new, length) in enumerate(zip(query_lengths, context_lengths, strict=True)):
        first = 0 if window is None else max(0, length - num_new - window + 1)
        first_page, last_page = first // page_size, (length - 1) // page_size
        start, stop = first - first_page * page_size, length - first_page * page_size
        if num_new == 1:
            decodes.append(_Decode(sequence, row, first_page, last_page, start, stop))
        else:
            causal = num_new == length and (window is None or window >= length)
            chunks.append(
                Chunk(
                    rows=slice(row, row + num_new),
                    pages=page_tables[sequence, first_page : last_page + 1].to(device),
                    span=slice(start, stop),
                    mask=None if causal else _additive(_seen_by_chunk(num_new, stop - start, window)).to(device),
                )
            )
        row += num_new
    blocks = (_decode_block(page_tables, block, page_size, device) for block in _blocks_of(decodes, page_size))
    return GatherPlan(tuple(blocks), tuple(chunks))


def gathered_attention(
    query_TND: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    plan: GatherPlan,
    heads: HeadGroups,
    *,
    scale: float,
    logit_softcap: float | None,
    kv_scales: KVScales | None = None,
) -> torch.Tensor:
    """As `paged_attention`. Of caches in 8 bits everything is computed in float32 at least, as which they are exact."""
    dtype = query_TND.dtype
    if kv_scales is not None:
        query_TND = query_TND.to(torch.promote_types(dtype, torch.float32))
    key_scales, value_scales = kv_scales or (None, None)
    out_TND = query_TND.new_empty(query_TND.shape, dtype=dtype)

    def gathered(
        pages: torch.Tensor, span: slice, num_sequences: int = 1, blank: torch.Tensor | None = None
    ) -> Iterator[torch.Tensor]:
        for cache, scales in ((key_cache, key_scales), (value_cache, value_scales)):
            yield _gather(cache, scales, query_TND.dtype, pages, span, num_sequences, blank)

    for block in plan.decodes:
        # The G query heads of a KV head are the rows of one small matrix, so that its keys are not copied G times.
        q_BPD = heads.arrange(query_TND[block.rows])
        out_BKGD = _attention(
            q_BPD.reshape(block.num_sequences, heads.num_kv_heads, -1, q_BPD.shape[-1]),
            *gathered(block.pages, block.span, block.num_sequences, block.blank),
            attn_mask=None if block.mask is None else block.mask.to(query_TND.dtype),
            scale=scale,
            logit_softcap=logit_softcap,
        )
        out_TND[block.rows] = heads.restore(out_BKGD.flatten(1, 2)).to(dtype)
    for chunk in plan.chunks:
        out_1PTD = _attention(
            heads.arrange(query_TND[chunk.rows]).transpose(0, 1).unsqueeze(0),
            *gathered(chunk.pages, chunk.span),
            attn_mask=None if chunk.mask is None else chunk.mask.to(query_TND.dtype),
            is_causal=chunk.mask is None,
            scale=scale,
            logit_softcap=logit_softcap,
        )
        out_TND[chunk.rows] = heads.restore(out_1PTD.squeeze(0).transpose(0, 1)).to(dtype)
    return out_TND


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None,
    scale: float,
    logit_softcap: float | None,
    is_causal: bool = False,
) -> torch.Tensor:
    """SDPA of [B, K G, T, D] over [B, K, L, D], or the same with a cap (Gemma 2, arXiv 2408.00118), which it lacks."""
    if logit_softcap is None:
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=True
        )
    if is_causal:
        attn_mask = _additive(_seen_by_chunk(query.shape[2], keys.shape[2], None)).to(query.device, query.dtype)
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    scores = torch.tanh((query * (scale / logit_softcap)) @ keys.transpose(-1, -2)) * logit_softcap
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ values


class _Decode(NamedTuple):
    """A sequence with one new token: its place among the sequences, its row in the step, the first and last page of its
    table that it attends to, and from where to where in these.
    """

    sequence: int
    row: int
    first_page: int
    last_page: int
    start: int
    stop: int

    @property
    def num_pages(self) -> int:
        return self.last_page - self.first_page + 1


def _blocks_of(decodes: Sequence[_Decode], page_size: int) -> Iterator[list[_Decode]]:
    """Cuts `decodes`, longest first, into blocks of at most BLOCK_TOKENS, padding included, which so stays below that
    however unequal they are. A longer sequence is a block of its own.
    """
    block: list[_Decode] = []
    for decode in sorted(decodes, key=lambda decode: -decode.num_pages):
        if block and (len(block) + 1) * block[0].num_pages * page_size > BLOCK_TOKENS:
            yield block
            block = []
        block.append(decode)
    if block:
        yield block


def _decode_block(
    page_tables: torch.Tensor, decodes: Sequence[_Decode], page_size: int, device: torch.device
) -> DecodeBlock:
    sequence, _, first_page, last_page, start, stop = torch.tensor(decodes).unsqueeze(2).unbind(1)
    num_pages = decodes[0].num_pages
    # Sequences with fewer pages have their last one again in place of those they lack; the mask leaves them out.
    columns = (first_page + torch.arange(num_pages)).minimum(last_page)
    span = slice(min(decode.start for decode in decodes), max(decode.stop for decode in decodes))
    blank = mask = None
    if len(decodes) > 1:
        position = torch.arange(num_pages * page_size)
        seen = (position >= start) & (position < stop)
        blank = seen.logical_not().view(-1).nonzero().view(-1).to(device)
        mask = _additive(seen[:, None, None, span]).to(device)
    return DecodeBlock(
        num_sequences=len(decodes),
        rows=_rows([decode.row for decode in decodes], device),
        pages=page_tables[sequence, columns].flatten().to(device),
        span=span,
        blank=blank,
        mask=mask,
    )


def _rows(rows: list[int], device: torch.device) -> slice | torch.Tensor:
    """As a slice where they are consecutive, for a view instead of a copy."""
    consecutive = slice(rows[0], rows[0] + len(rows))
    return consecutive if rows == list(range(consecutive.start, consecutive.stop)) else torch.tensor(rows).to(device)


def _seen_by_chunk(num_queries: int, num_keys: int, window: int | None) -> torch.Tensor:
    """[num_queries, num_keys] bool: what each of the last num_queries of num_keys positions sees."""
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril_(num_keys - num_queries)
    return seen if window is None else seen.triu_(num_keys - num_queries - window + 1)


def _additive(seen: torch.Tensor) -> torch.Tensor:
    """0 where true, -inf elsewhere, float32. From a boolean mask SDPA would make the same in every layer."""
    return torch.where(seen, 0.0, float("-inf"))


def _gather(
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    dtype: torch.dtype,
    pages: torch.Tensor,
    span: slice,
    num_sequences: int,
    blank: torch.Tensor | None,
) -> torch.Tensor:
    """The positions `span` of each sequence's pages: [pages, page_size, K, D] -> [B, K, L, D] of `dtype`, a strided
    view.
    """
    tokens = as_bytes(cache).index_select(0, pages).view(cache.dtype).flatten(0, 1)
    if scales is not None:
        tokens = dequantise_kv(tokens, scales_of_slots(scales.index_select(0, pages)).flatten(0, 1), dtype)
    if blank is not None:
        tokens.index_fill_(0, blank, 0.0)  # a weight of 0 does not silence NaN
    return tokens.view(num_sequences, -1, *cache.shape[2:])[:, span].transpose(1, 2)
