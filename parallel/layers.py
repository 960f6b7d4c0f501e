"""Tensor-parallel layers: a shard of the weights and the communicator of the stage, nothing else.

Shapes: T tokens of a step, H hidden size, and on this rank O output columns, I input columns, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import Weight, linear, rms_norm
from phalanx.parallel.overlap import Overlap, reduce_in_chunks
from phalanx.parallel.split import Interval


@dataclass(frozen=True, slots=True)
class ColumnParallelLinear:
    """Output columns cut over the ranks: each rank reads all of x and makes its own. weight [O, H], bias [O]."""

    weight: Weight
    bias: torch.Tensor | None = None

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        return linear(x_TH, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class RowParallelLinear:
    """Input columns cut over the ranks: each makes a part of the sum, which is then reduced. weight [H, I], bias [H].

    The bias is held by every rank and added after the reduction, so that it counts once. overlap: decides whether a
    part of the tokens is reduced while the next is computed; None for never.
    """

    weight: Weight
    comm: Communicator
    bias: torch.Tensor | None = None
    overlap: Overlap | None = None

    def __call__(self, x_TI: torch.Tensor) -> torch.Tensor:
        num_chunks = self._num_chunks(x_TI)
        if num_chunks == 1:
            y_TH = self.comm.all_reduce(linear(x_TI, self.weight))
        else:
            y_TH = reduce_in_chunks(self.comm, x_TI, self.weight, num_chunks)
        return y_TH if self.bias is None else y_TH + self.bias

    def _num_chunks(self, x_TI: torch.Tensor) -> int:
        return 1 if self.overlap is None else self.overlap.cut(x_TI.shape[0], self.weight)

    def add_and_norm(
        self, x_TI: torch.Tensor, residual_TH: torch.Tensor, norm_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The product added to the residual stream, normalised by `norm_weight` [H], and as it is: both [T, H]."""
        if self.bias is None and self._num_chunks(x_TI) == 1:
            y_TH = linear(x_TI, self.weight)
            return self.comm.fused_all_reduce_rms_norm(y_TH, residual_TH, norm_weight, eps)
        residual_TH = residual_TH + self(x_TI)
        return rms_norm(residual_TH, norm_weight, eps), residual_TH


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    """Vocabulary rows cut over the ranks: each looks up the tokens it holds, zeros elsewhere, and the sum is whole."""

    weight: Weight
    rows: Interval
    comm: Communicator

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self.comm.size == 1:
            return self.weight[tokens_T]
        local_T = tokens_T - self.rows.start
        missing_T = (local_T < 0) | (local_T >= self.rows.size)
        x_TH = self.weight[local_T.masked_fill(missing_T, 0)]
        return self.comm.all_reduce(x_TH.masked_fill_(missing_T.unsqueeze(1), 0))
