"""Attention over pages, as it is measured: what it is called with, in the model's dtype or in 8 bits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from phalanx import kernels
from phalanx.kernels import AttentionPlan, HeadGroups, KVScales


class Pages(NamedTuple):
    """Of attention. keys, values: [copies, pages, page size, KV heads, D]. query: [T, heads, D]. tables: [S, pages of a
    sequence]. scales: of keys and values in 8 bits, [copies, pages, KV heads, page size] each.
    """

    keys: torch.Tensor
    values: torch.Tensor
    query: torch.Tensor
    tables: torch.Tensor
    plan: AttentionPlan
    heads: HeadGroups
    scale: float
    scales: KVScales | None = None

    def attend(self, copy: int) -> torch.Tensor:
        scales = None if self.scales is None else (self.scales[0][copy], self.scales[1][copy])
        return kernels.paged_attention(
            self.query, self.keys[copy], self.values[copy], self.plan, self.heads, scale=self.scale, kv_scales=scales
        )

    def narrow(self, dtype: torch.dtype) -> Pages:
        """The same in 8 bits."""
        (keys, of_keys), (values, of_values) = (
            zip(*(_narrowed(pages, dtype) for pages in half), strict=True) for half in (self.keys, self.values)
        )
        scales = torch.stack(of_keys), torch.stack(of_values)
        return self._replace(keys=torch.stack(keys), values=torch.stack(values), scales=scales)


def _narrowed(pages: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages [pages, page size, KV heads, D] in 8 bits, and their scales."""
    q_TKD, scales_TK = kernels.quantise_kv(pages.flatten(0, 1), dtype)
    return q_TKD.view(pages.shape), scales_TK.view(pages.shape[:3]).transpose(1, 2).contiguous()
