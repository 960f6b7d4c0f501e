"""`integer_product`: rows in integers times a matrix in integers, and sums of it that do not depend on their order."""

from __future__ import annotations

import torch
import torch.nn.functional as F

MOST_INPUTS = 64  # that share a scale; `kMostInputs` in integers.hpp

# A float64 of this size has steps of 2^-30: what is added to it and taken from it again is rounded to them.
_GRID = 1.5 * 2.0**22


def integer_product(
    x: torch.Tensor,
    q: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    group_size: int,
    input_group: int,
) -> torch.Tensor:
    """x [T, K] of any floating dtype, q [N, K] whole numbers up to 255 in float32, scales and offsets or None
    [N, groups] -> x W^T [T, N] float64, where W = scales * q + offsets.

    x is read as integers from -127 to 127 times a scale, of every `input_group` inputs (64 at most) or what is left of
    a group of the weight, of `group_size`: a 127th of their largest magnitude. What such inputs add is exact, and then
    rounded to a multiple of 2^-30. So below 2^22 the sums are exact: in any order, and of parts that ranks add up.
    """
    num_inputs = q.shape[1]
    y = torch.zeros(len(x), len(q), dtype=torch.float64)
    values = x.float()
    for group, first in enumerate(range(0, num_inputs, group_size)):
        end = min(first + group_size, num_inputs)
        scale = scales[:, group].double()
        for start in range(first, end, input_group):
            inputs = slice(start, min(start + input_group, end))
            integers, row_scales = _integers(values[:, inputs])
            share = F.linear(integers, q[:, inputs]).double() * scale
            if offsets is not None:
                share += integers.sum(1, keepdim=True).double() * offsets[:, group].double()
            y += share.mul_(row_scales.double()).add_(_GRID).sub_(_GRID)
    return y


def _integers(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers [T, K], the scale of each row [T, 1]), both float32."""
    largest = x.abs().amax(1, keepdim=True)
    # By a tensor: of a number PyTorch makes a product with the reciprocal, which is not rounded alike.
    factors = torch.where(largest > 1e-30, torch.tensor(127.0) / largest, torch.zeros(()))
    return (x * factors).round_(), torch.where(largest > 1e-30, largest / 127, torch.zeros(()))
