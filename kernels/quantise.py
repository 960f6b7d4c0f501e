"""`quantise`: rows of a matrix as integers, their scales and offsets."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from phalanx.kernels.quantised_rows import LIMITS
from phalanx.kernels.quantised_weight import QuantisedRows, WeightFormat

# Of 4 bits the ends of a group's range need not be hit: in a narrower one they are cut off, and the others err less. Of
# these parts of the range, the one with the least squared error is taken, for each group.
_RANGE_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8)


def quantise(rows: torch.Tensor, held: WeightFormat, importance: torch.Tensor | None = None) -> QuantisedRows:
    """rows [R, K] of any floating dtype. importance: [K], of the squared error of each input; None for all alike.

    Without offsets or zeros the largest magnitude of a group becomes 127, of 4 bits 7, of E4M3 448. With either, of 4
    bits, 0 and 15 are about the ends of the group's range, to which with zeros 0 belongs.
    """
    num_rows, num_inputs = rows.shape
    group, groups = held.group_of(num_inputs), held.num_groups(num_inputs)
    missing = groups * group - num_inputs
    x = torch.cat([rows.float(), rows[:, -1:].float().expand(-1, missing)], 1).view(num_rows, groups, group)
    if importance is not None:
        importance = F.pad(importance.float(), (0, missing)).view(groups, group)
    best: QuantisedRows | None = None
    least: torch.Tensor | None = None
    for part in _RANGE_PARTS if held.bits == 4 else (1.0,):
        found = _in_range(x, part, held)
        if best is None:
            best = found
            continue
        if least is None:
            least = _squared_error(x, best, importance)
        error = _squared_error(x, found, importance)
        better, least = error < least, torch.minimum(error, least)
        best = QuantisedRows(*(_chosen(better, one, other) for one, other in zip(found, best, strict=True)))  # type: ignore[arg-type]
    assert best is not None
    return best._replace(q=best.q.flatten(1)[:, :num_inputs])


def _in_range(x: torch.Tensor, part: float, held: WeightFormat) -> QuantisedRows:
    """x [R, groups, group] by a scale that has so much of the range."""
    high = 7 if held.bits == 4 else int(LIMITS[held.q_dtype])
    low, high = (0, 15) if held.offsets or held.zeros else (-high, high)
    offsets: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    if held.offsets:
        start, stop = x.amin(-1) * part, x.amax(-1) * part
        scales, offsets = ((stop - start) / 15).to(held.scale_dtype), start.to(held.scale_dtype)
        x = x - offsets.float().unsqueeze(-1)
    elif held.zeros:
        start, stop = x.amin(-1).clamp_(max=0) * part, x.amax(-1).clamp_(min=0) * part
        scales = ((stop - start) / 15).to(held.scale_dtype)
    else:
        scales = (x.abs().amax(-1) * (part / high)).to(held.scale_dtype)
    inverse = scales.float().reciprocal()
    inverse = inverse.masked_fill_(~inverse.isfinite(), 0.0)  # of zeros
    q = x * inverse.unsqueeze(-1)
    q = q if held.e4m3 else q.round_()
    if held.zeros:
        zeros = (start * -inverse).round_().clamp_(low, high).to(torch.uint8)
        q += zeros.unsqueeze(-1)
    return QuantisedRows(q.clamp_(low, high).to(held.q_dtype).view(torch.int8), scales, offsets, zeros)


def _squared_error(x: torch.Tensor, rows: QuantisedRows, importance: torch.Tensor | None) -> torch.Tensor:
    """Of each group, [R, groups]. importance: [groups, group]."""
    q = rows.q if rows.zeros is None else rows.q - rows.zeros.unsqueeze(-1).view(torch.int8)
    values = q * rows.scales.float().unsqueeze(-1)
    if rows.offsets is not None:
        values += rows.offsets.float().unsqueeze(-1)
    squares = values.sub_(x).square_()
    return (squares if importance is None else squares.mul_(importance)).sum(-1)


def _chosen(better: torch.Tensor, one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    if one is None or other is None:
        return None
    return torch.where(better if one.dim() == 2 else better.unsqueeze(-1), one, other)
