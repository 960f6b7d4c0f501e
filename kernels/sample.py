"""`sample`: tokens drawn from logits; and what a shard of the vocabulary tells of itself for that.

A draw is the largest of scaled logit and Gumbel noise, which depends on (seed, position, token) alone (`gumbel_noise`).

Shapes: B rows, V vocabulary rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.random import gumbel_noise


class SamplingRows(NamedTuple):
    """What a draw needs to know of each row: [B] each, on the logits' device.

    temperature: float64; not above zero for the likeliest token. top_k: int64, 0 for all. top_p, min_p: float64, 1 and
    0 for all. seed, position: int64.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    position: torch.Tensor


def sample(logits_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The token drawn for each row, [B] int64; the logits are of the whole vocabulary, float32.

    Order: temperature, min_p, top_k, top_p. The mass that top_p counts in is of the k best where top_k cuts, else of
    all that min_p leaves. Nothing here waits for a GPU, so it can be part of a CUDA graph.
    """
    gpu = triton_gpu.operators_for(logits_BV)
    if gpu is not None:
        return gpu.sample(logits_BV, *rows)  # type: ignore[no-any-return]
    greedy_B1 = rows.temperature.unsqueeze(1) <= 0
    scaled_BV = logits_BV.double() / rows.temperature.unsqueeze(1).masked_fill(greedy_B1, 1)
    values_BV, tokens_BV = scaled_BV.sort(dim=1, descending=True, stable=True)
    below_BV = values_BV < values_BV[:, :1] + rows.min_p.unsqueeze(1).log()
    limit_B1 = torch.where(rows.top_k > 0, rows.top_k, logits_BV.shape[1]).unsqueeze(1)
    order_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    values_BV = values_BV.masked_fill(below_BV | (order_V >= limit_B1), -math.inf)
    before_BV = values_BV.softmax(1).cumsum(1).roll(1, dims=1)
    before_BV[:, 0] = 0  # the most likely token is always kept
    top_p_B1 = rows.top_p.unsqueeze(1)
    values_BV = values_BV.masked_fill((before_BV >= top_p_B1) & (top_p_B1 < 1), -math.inf)
    noise_BV = gumbel_noise(rows.seed.unsqueeze(1), rows.position.unsqueeze(1), tokens_BV)
    choice_B1 = (values_BV + noise_BV.masked_fill(greedy_B1, 0)).argmax(1, keepdim=True)
    return tokens_BV.gather(1, choice_B1).squeeze(1)
