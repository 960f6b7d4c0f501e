"""What flows into a step of the decoder beside the tokens, and the KV cache that it works on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from phalanx.kernels import KV_DTYPES, AttentionPlan, KVScales


class Part(NamedTuple):
    """Tokens of a step that pass a layer together: those of some sequences, laid one after another.

    positions: [T] int64, of each token in its sequence. slots: [T] int64, where its key and value go in the cache.
    attention: which keys and values each token sees. kept: whether all this, and the tokens themselves, lies where it
    lies for every kept part of as many tokens.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    attention: AttentionPlan
    kept: bool = False


class Batch(NamedTuple):
    """The tokens of a step.

    parts: one after another, each behind the ones before it in every layer, so that a sequence may go on in the next.
    last_rows: [B] int64, rows of the step whose next token is to be drawn; None for all, in order.
    """

    parts: tuple[Part, ...]
    last_rows: torch.Tensor | None


class LayerPages(NamedTuple):
    """Keys and values of a layer, [pages, page_size, kv_heads, head_dim] each. scales: of pages in 8 bits."""

    keys: torch.Tensor
    values: torch.Tensor
    scales: KVScales | None


class KVCache:
    """Keys and values of this rank's layers and KV heads, in pages: [layers, pages, page_size, kv_heads, head_dim]
    each; in 8 bits with scales [layers, pages, kv_heads, page_size] of both.

    dtype: of the model. kv_cache_dtype: as `engine.kv_cache_dtype`, auto for that of the model.
    """

    def __init__(
        self,
        num_layers: int,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        kv_cache_dtype: str = "auto",
    ) -> None:
        dtype = KV_DTYPES.get(kv_cache_dtype, dtype)
        shape = (num_layers, num_pages, page_size, num_kv_heads, head_dim)
        self.num_pages = num_pages
        self.page_size = page_size
        # Left unwritten: attention reads only what a step has stored, and a CPU then gives memory only as it is used.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.scales: KVScales | None = None
        if kv_cache_dtype != "auto":
            of_scales = (num_layers, num_pages, num_kv_heads, page_size)
            key_scales = torch.empty(of_scales, dtype=torch.bfloat16, device=device)
            self.scales = key_scales, torch.empty_like(key_scales)

    def __iter__(self) -> Iterator[LayerPages]:
        """Layer by layer."""
        for layer, pages in enumerate(zip(self.keys, self.values, strict=True)):
            scales = None if self.scales is None else (self.scales[0][layer], self.scales[1][layer])
            yield LayerPages(*pages, scales)

    @property
    def num_bytes(self) -> int:
        return sum(each.nbytes for each in (self.keys, self.values, *(self.scales or ())))
