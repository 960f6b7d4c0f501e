"""`quantise`: rows of a matrix as integers and their scales."""

from __future__ import annotations

import torch

from phalanx.kernels.quantised_weight import QuantisedRows, WeightFormat

# Of 4 bits the largest number of a group need not be hit: with a smaller scale it is cut off, and the others err less.
# Of these parts of the scale that hits it, the one with the least squared error is taken, for each group.
_SCALE_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantise(rows: torch.Tensor, held: WeightFormat) -> QuantisedRows:
    """rows [R, K] of any floating dtype; symmetric: without offsets.

    8 bits: the largest magnitude of a group becomes 127, so that an error is half of a 127th of it at most. 4 bits: the
    number of the largest magnitude becomes -8, or is a little beyond.
    """
    num_rows, num_inputs = rows.shape
    group = held.group_of(num_inputs)
    groups = held.num_groups(num_inputs)
    padded = torch.zeros(num_rows, groups * group)
    padded[:, :num_inputs] = rows
    x = padded.view(num_rows, groups, group)
    if held.bits == 8:
        scales = x.abs().amax(-1) / 127
        q, scales = _rounded(x, scales, held)
    else:
        largest = x.gather(-1, x.abs().argmax(-1, keepdim=True)).squeeze(-1)
        q, scales = _rounded(x, largest / -8, held)
        error = _squared_error(x, q, scales)
        for part in _SCALE_PARTS[1:]:
            other = _rounded(x, largest * (part / -8), held)
            other_error = _squared_error(x, *other)
            better = other_error < error
            error = torch.where(better, other_error, error)
            scales = torch.where(better, other[1], scales)
            q = torch.where(better.unsqueeze(-1), other[0], q)
    return QuantisedRows(q.view(num_rows, -1)[:, :num_inputs].contiguous(), scales)


def _rounded(x: torch.Tensor, scales: torch.Tensor, held: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers next to x by these scales, as they are stored."""
    scales = scales.to(held.scale_dtype)
    inverse = scales.float().reciprocal()
    inverse = torch.where(inverse.isfinite(), inverse, torch.zeros(()))
    low, high = (-128, 127) if held.bits == 8 else (-8, 7)
    return (x * inverse.unsqueeze(-1)).round_().clamp_(low, high).to(torch.int8), scales


def _squared_error(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (q * scales.float().unsqueeze(-1)).sub_(x).square_().sum(-1)
