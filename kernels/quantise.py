"""`quantise`: rows of a matrix as integers, their scales and offsets."""

from __future__ import annotations

import torch

from phalanx.kernels.quantised_rows import LIMITS
from phalanx.kernels.quantised_weight import QuantisedRows, WeightFormat

# Of 4 bits the ends of a group's range need not be hit: in a narrower one they are cut off, and the others err less. Of
# these parts of the range, the one with the least squared error is taken, for each group.
_RANGE_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantise(rows: torch.Tensor, held: WeightFormat) -> QuantisedRows:
    """rows [R, K] of any floating dtype.

    Without offsets the largest magnitude of a group becomes 127, of 4 bits 7, and of E4M3 448. With offsets, of 4 bits,
    0 and 15 are about the ends of the group's range.
    """
    num_rows, num_inputs = rows.shape
    group, groups = held.group_of(num_inputs), held.num_groups(num_inputs)
    missing = groups * group - num_inputs
    x = torch.cat([rows.float(), rows[:, -1:].float().expand(-1, missing)], 1).view(num_rows, groups, group)
    best: QuantisedRows | None = None
    least: torch.Tensor | None = None
    for part in _RANGE_PARTS if held.bits == 4 else (1.0,):
        found = _in_range(x, part, held)
        if best is None:
            best = found
            continue
        if least is None:
            least = _squared_error(x, best)
        error = _squared_error(x, found)
        better, least = error < least, torch.minimum(error, least)
        best = QuantisedRows(*(_chosen(better, one, other) for one, other in zip(found, best, strict=True)))  # type: ignore[arg-type]
    assert best is not None
    return best._replace(q=best.q.flatten(1)[:, :num_inputs])


def _in_range(x: torch.Tensor, part: float, held: WeightFormat) -> QuantisedRows:
    """x [R, groups, group] by a scale that has so much of the range."""
    high = 7 if held.bits == 4 else int(LIMITS[held.q_dtype])
    low, high = (0, 15) if held.offsets else (-high, high)
    offsets: torch.Tensor | None = None
    if held.offsets:
        start, stop = x.amin(-1) * part, x.amax(-1) * part
        scales, offsets = ((stop - start) / 15).to(held.scale_dtype), start.to(held.scale_dtype)
        x = x - offsets.float().unsqueeze(-1)
    else:
        scales = (x.abs().amax(-1) * (part / high)).to(held.scale_dtype)
    inverse = scales.float().reciprocal()
    inverse = inverse.masked_fill_(~inverse.isfinite(), 0.0)  # of zeros
    q = x * inverse.unsqueeze(-1)
    q = q if held.e4m3 else q.round_()
    return QuantisedRows(q.clamp_(low, high).to(held.q_dtype).view(torch.int8), scales, offsets)


def _squared_error(x: torch.Tensor, rows: QuantisedRows) -> torch.Tensor:
    """Of each group, [R, groups]."""
    values = rows.q * rows.scales.float().unsqueeze(-1)
    if rows.offsets is not None:
        values += rows.offsets.float().unsqueeze(-1)
    return values.sub_(x).square_().sum(-1)


def _chosen(better: torch.Tensor, one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return None
    return torch.where(better if one.dim() == 2 else better.unsqueeze(-1), one, other)
