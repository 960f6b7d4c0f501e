"""`embedding`: the rows of a vocabulary shard that tokens name."""

from __future__ import annotations

import torch

from phalanx.kernels import triton_gpu
from phalanx.kernels.packed import PackedWeight, Weight
from phalanx.kernels.quantised_weight import QuantisedWeight


def embedding(tokens: torch.Tensor, weight: Weight, first: int = 0) -> torch.Tensor:
    """tokens [T] int64, weight [V, H]: of the vocabulary the rows from `first` on -> [T, H], zeros for tokens that the
    shard does not hold.
    """
    if isinstance(weight, PackedWeight | QuantisedWeight):
        return weight.held_rows(tokens, first)
    gpu = triton_gpu.operators_for(tokens)
    if gpu is not None:
        return gpu.embedding(tokens, weight, first)  # type: ignore[no-any-return]
    local = tokens - first
    missing = (local < 0) | (local >= weight.shape[0])
    return weight[local.masked_fill(missing, 0)].masked_fill_(missing.unsqueeze(1), 0)
