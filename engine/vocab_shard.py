"""What the ranks of a stage tell each other about rows of logits whose vocabulary is cut over them.

Every rank learns the same, in one transfer a question, and of each row only a rank's best entries leave it.

Shapes: B rows, V vocabulary rows of this rank, R ranks, C candidates, K candidates of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import argmax, argmax_keys, columns_of_keys, top
from phalanx.parallel.split import Split

# Entries that a pass over whole rows takes at a time. On a CPU its temporaries, 4 MiB in float64, are then memory that
# the allocator keeps: drawing for 256 rows of 49152 takes a sixth of the time that it takes with the rows all at once.
# On a GPU only their size is bounded, to 128 MiB each.
HOST_BLOCK = 2**19
DEVICE_BLOCK = 2**24


class Candidates(NamedTuple):
    """Entries of the distribution, over all ranks, best first. values: [B, C] float64. tokens: [B, C] int64."""

    values: torch.Tensor
    tokens: torch.Tensor


class VocabShard:
    """The vocabulary rows that this rank of `comm` holds under the split `vocab`. All ranks make the same calls."""

    def __init__(self, vocab: Split, comm: Communicator) -> None:
        self.vocab_size = vocab.size
        self.rows = vocab[comm.rank]
        self._sizes = vocab.sizes
        self._comm = comm

    @property
    def whole(self) -> bool:
        """Whether this rank holds all of the vocabulary."""
        return self.rows.size == self.vocab_size

    def argmax(self, values_BV: torch.Tensor) -> torch.Tensor:
        """The token with the largest value over all ranks, [B] int64; the first of equals."""
        if self._comm.size == 1:
            return argmax(values_BV)
        return self.winner_of_keys(argmax_keys(values_BV, self.rows.start))

    def winner_of_keys(self, keys_B: torch.Tensor) -> torch.Tensor:
        """The token, [B] int64, that the largest of the ranks' keys names. The tensor given may hold that key then."""
        return columns_of_keys(keys_B if self._comm.size == 1 else self._comm.all_reduce(keys_B, op="max"))

    def winner(self, value_B: torch.Tensor, column_B: torch.Tensor) -> torch.Tensor:
        """The token, [B] int64, of the largest of the ranks' values, float64, which they hold in these columns."""
        if self._comm.size == 1:
            return column_B
        # Token ids are exact in float64, so that one transfer carries both.
        all_R2B = self._from_all(torch.stack((value_B, (column_B + self.rows.start).double())))
        best_B = all_R2B[:, 0].argmax(0, keepdim=True)
        return all_R2B[:, 1].gather(0, best_B).squeeze(0).long()

    def candidates(self, values_BV: torch.Tensor, count: int) -> Candidates:
        """The best `count` entries over all ranks, or all there are; equal values in order of their tokens.

        Where a row has fewer entries above minus infinity, the rest of its candidates are any that are not.
        """
        values_BK, column_BK = top(values_BV, min(count, self.rows.size))
        values_BC, tokens_BC = values_BK.double(), column_BK + self.rows.start
        if self._comm.size > 1:
            own_K2B = torch.stack((values_BC.T, tokens_BC.T.double()), 1)
            all_C2B = self._comm.all_gather(own_K2B, sizes=[min(count, size) for size in self._sizes])
            values_BC, order_BC = top(all_C2B[:, 0].T, min(count, self.vocab_size))
            tokens_BC = all_C2B[:, 1].T.gather(1, order_BC).long()
        return Candidates(values_BC, tokens_BC)

    def logsumexp(self, own_B: torch.Tensor) -> torch.Tensor:
        """Of values that are each rank's own logsumexp, [B] float64."""
        return own_B if self._comm.size == 1 else self._from_all(own_B.unsqueeze(0)).logsumexp(0).squeeze(0)

    def sum(self, own: torch.Tensor) -> torch.Tensor:
        """Of each rank's own values, whole numbers of any shape; the tensor that was given may hold them."""
        return own if self._comm.size == 1 else self._comm.all_reduce(own)

    def before_and_all(self, own_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of each rank's own values, over the ranks with lower tokens and over all."""
        if self._comm.size == 1:
            return torch.zeros_like(own_B), own_B
        all_RB = self._from_all(own_B)
        return all_RB[: self._comm.rank].sum(0), all_RB.sum(0)

    def max(self, own_B: torch.Tensor) -> torch.Tensor:
        """Of each rank's own values, [B] float64."""
        return own_B if self._comm.size == 1 else self._from_all(own_B.unsqueeze(0)).amax(0).squeeze(0)

    def _from_all(self, own: torch.Tensor) -> torch.Tensor:
        """The ranks' tensors of one shape, [R, ...]."""
        return self._comm.all_gather(own.contiguous()).view(self._comm.size, *own.shape)


def blocks(num_rows: int, like_BV: torch.Tensor) -> Iterator[slice]:
    """Rows to take at a time, of so many as wide as these, in a pass whose temporaries are wider still."""
    entries = HOST_BLOCK if like_BV.is_cpu else DEVICE_BLOCK
    step = max(1, entries // like_BV.shape[1])
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def lags(x: torch.Tensor) -> bool:
    """Whether who reads a tensor waits for the device that makes it, as of a GPU."""
    return not x.is_cpu


def on_device(values: npt.NDArray[np.generic], like: torch.Tensor) -> torch.Tensor:
    """What the host knows of rows, where the rows are. A GPU copies it in its turn, and nobody waits for that."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if like.is_cpu:
        return host
    return host.pin_memory().to(like.device, non_blocking=True)  # PyTorch keeps the pinned memory until it is copied
