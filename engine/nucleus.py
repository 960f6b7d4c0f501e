"""The nucleus of top_p (Holtzman et al. 2019, arXiv 1904.09751) of a vocabulary cut over ranks, however wide it is.

Its border is found as a radix search finds a place in an order: the ranks add up the mass that lies in each range of
logits, know from the sums in which range the border is, and divide that one again. Three sums lead to a single number,
and one exchange to how many of the tokens that share it belong, so that nothing is sorted and nobody asks the device
how far it has come.

Masses are whole numbers: their sums are the same in whatever order they are added up, and so on every layout. A mass is
rounded to a `2^-44`th of the likeliest token's with up to 2^18 tokens.

Shapes: B rows, V vocabulary rows of this rank, D ranges of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from phalanx.engine.vocab_shard import VocabShard, blocks

_ROUNDS = ((21, 11), (10, 11), (0, 10))  # shift and width of the bits of a key that each round divides by
_MOST_BITS = 62  # of the sum of all masses

Scaled = Callable[[slice], torch.Tensor]
"""A block of rows: logits over their temperatures, float64, minus infinity for what cannot be drawn."""


class Nucleus(NamedTuple):
    """cut: [B, 1] int64, the least key that belongs. quota: [B, 1] int64, how many of this rank's tokens with that key,
    the first ones.
    """

    cut: torch.Tensor
    quota: torch.Tensor

    def holds(self, logits_BV: torch.Tensor, block: slice) -> torch.Tensor:
        """Whether each token of these rows belongs, [B, V]."""
        key_BV, cut_B1 = _keys(logits_BV[block]), self.cut[block]
        equal_BV = key_BV == cut_B1
        return (key_BV > cut_B1) | (equal_BV & (equal_BV.cumsum(1) <= self.quota[block]))


def find_nucleus(
    shard: VocabShard, logits_BV: torch.Tensor, scaled: Scaled, top_B1: torch.Tensor, top_p_B1: torch.Tensor
) -> Nucleus:
    """The likeliest tokens that together have `top_p` of the mass, the fewest, and one at least; of equals the first.

    logits_BV: this rank's shard, float32. top_B1, top_p_B1: float64; the largest scaled logit over all ranks, and the
    part of the mass, below 1.
    """
    unit = 2.0 ** (_MOST_BITS - (shard.vocab_size - 1).bit_length())
    num_rows = len(logits_BV)
    all_rows = list(blocks(num_rows, logits_BV))
    cut_B1 = above_B1 = torch.zeros((num_rows, 1), dtype=torch.int64, device=logits_BV.device)
    least_B1: torch.Tensor | None = None
    for shift, width in _ROUNDS:
        mass_BD = torch.zeros((num_rows, 1 << width), dtype=torch.int64, device=logits_BV.device)
        for block in all_rows:
            key_BV = _keys(logits_BV[block])
            mass_BV = (scaled(block) - top_B1[block]).exp_().mul_(unit).round_().long()
            mass_BV *= (key_BV >> shift + width) == cut_B1[block]
            mass_BD[block].scatter_add_(1, (key_BV >> shift) & ((1 << width) - 1), mass_BV)
        # From the largest logits on.
        mass_BD = shard.sum(mass_BD).flip(1)
        reached_BD = above_B1 + mass_BD.cumsum(1)
        if least_B1 is None:
            whole_B1 = reached_BD[:, -1:]
            least_B1 = (top_p_B1 * whole_B1).ceil().long().clamp(min=1).minimum(whole_B1)
        place_B1 = (reached_BD < least_B1).sum(1, keepdim=True)
        mass_B1 = mass_BD.gather(1, place_B1)
        above_B1 = reached_BD.gather(1, place_B1) - mass_B1
        cut_B1 = (cut_B1 << width) | ((1 << width) - 1 - place_B1)
    assert least_B1 is not None
    own_B = torch.cat([(_keys(logits_BV[block]) == cut_B1[block]).sum(1) for block in all_rows])
    before_B, all_B = shard.before_and_all(own_B)
    each_B1 = mass_B1 // all_B.unsqueeze(1)  # equal tokens have equal masses
    quota_B1 = -((above_B1 - least_B1) // each_B1)
    return Nucleus(cut_B1, quota_B1 - before_B.unsqueeze(1))


def _keys(logits_BV: torch.Tensor) -> torch.Tensor:
    """Whole numbers from 0 to 2^32 - 1 in the order of float32 logits, the same for both zeros."""
    bits_BV = (logits_BV + 0.0).view(torch.int32)
    return torch.where(bits_BV < 0, bits_BV ^ 0x7FFFFFFF, bits_BV).long() + (1 << 31)
