"""`rounded_inputs`: rows of a product as it reads them that quantises them, too."""

from __future__ import annotations

import torch

MOST_INPUTS = 64  # that share a scale; `kMostInputs` in integers.hpp


def rounded_inputs(x: torch.Tensor, group_size: int, input_group: int) -> torch.Tensor:
    """x [T, K] of any floating dtype -> [T, K] float32: integers from -127 to 127 times a scale, of every `input_group`
    inputs or what is left of a group of the weight, of `group_size`: a 127th of their largest magnitude.
    """
    num_inputs = x.shape[1]
    inputs = torch.arange(num_inputs, device=x.device)
    of_input = inputs // group_size * -(-group_size // input_group) + inputs % group_size // input_group
    num_groups = int(of_input[-1]) + 1 if num_inputs else 0
    values = x.float()
    largest = values.new_zeros(len(x), num_groups).scatter_reduce_(
        1, of_input.expand(len(x), -1), values.abs(), "amax", include_self=True
    )
    # By a tensor: of a number PyTorch makes a product with the reciprocal, which is not rounded alike.
    factors = torch.where(largest > 1e-30, torch.tensor(127.0) / largest, torch.zeros(()))
    scales = torch.where(largest > 1e-30, largest / 127, torch.zeros(()))
    return (values * factors[:, of_input]).round_().mul_(scales[:, of_input])
