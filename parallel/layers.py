"""Tensor-parallel layers: a shard of the weights and the communicator of the stage, nothing else.

Shapes: T tokens of a step, H hidden size, and on this rank O output columns, I input columns, V vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from phalanx.comm.communicator import Communicator, Handle
from phalanx.kernels import (
    Activations,
    Norm,
    QuantisingNorm,
    Recording,
    Weight,
    add_normed,
    embedding,
    is_native,
    linear,
    linear_part,
    taken_by,
)
from phalanx.parallel.split import Interval


@dataclass(frozen=True, slots=True)
class ColumnParallelLinear:
    """Output columns cut over the ranks: each rank reads all of x and makes its own. weight [O, H], bias [O].

    outputs: the rows of a larger weight that are multiplied by, as `kernels.linear` takes them; None for all.
    """

    weight: Weight
    bias: torch.Tensor | None = None
    outputs: slice | None = None

    def __call__(self, x_TH: Activations) -> torch.Tensor:
        return linear(x_TH, self.weight, self.bias, self.outputs)

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[0] if self.outputs is None else self.outputs.stop - self.outputs.start

    def norm_before(self, norm: torch.Tensor) -> Norm:
        """The norm [H] in front, which gives its rows as the product takes them."""
        takes = taken_by(self.weight)
        return norm if takes is None else QuantisingNorm(norm, takes)


@dataclass(frozen=True, slots=True)
class RowParallelSum:
    """Each rank makes a part of a sum, which is then reduced. bias [H].

    The bias is held by every rank and added after the reduction, so that it counts once. This one is given its part
    [T, H] as it is.
    """

    comm: Communicator
    bias: torch.Tensor | None = None

    def part(self, x_TI: Activations) -> torch.Tensor:
        """What this rank adds, [T, H]; sums of it are given to `biased`."""
        assert isinstance(x_TI, torch.Tensor)
        return x_TI

    def __call__(self, x_TI: Activations) -> torch.Tensor:
        return self.biased(self.comm.all_reduce(self.part(x_TI)))

    def biased(self, y_TH: torch.Tensor) -> torch.Tensor:
        """A sum over the ranks, or some rows of it, with the bias."""
        return y_TH if self.bias is None else y_TH + self.bias

    def add_and_norm(
        self, x_TI: Activations, residual_TH: torch.Tensor, norm: Norm, eps: float
    ) -> tuple[Activations, torch.Tensor]:
        """The sum added to the residual stream, normalised, and as it is: both [T, H]."""
        y_TH = self.part(x_TI)
        if self.bias is None and isinstance(norm, torch.Tensor) and y_TH.dtype == residual_TH.dtype:
            return self.comm.fused_all_reduce_rms_norm(y_TH, residual_TH, norm, eps)
        return add_normed(self.biased(self.comm.all_reduce(y_TH)), residual_TH, norm, eps)


@dataclass(frozen=True, slots=True)
class RowParallelLinear(RowParallelSum):
    """Input columns cut over the ranks: each rank's product is its part of the sum. weight [H, I]."""

    weight: Weight = field(kw_only=True)

    def part(self, x_TI: Activations) -> torch.Tensor:
        return linear_part(x_TI, self.weight)

    def biased(self, y_TH: torch.Tensor) -> torch.Tensor:
        return RowParallelSum.biased(self, y_TH.to(self.weight.dtype))


@dataclass(frozen=True, slots=True)
class VocabParallelEmbedding:
    """Vocabulary rows cut over the ranks: each looks up the tokens it holds, zeros elsewhere, and the sum is whole."""

    weight: Weight
    rows: Interval
    comm: Communicator

    def __call__(self, tokens_T: torch.Tensor) -> torch.Tensor:
        if self.comm.size == 1:
            return self.weight[tokens_T]
        return self.comm.all_reduce(self._held(tokens_T))

    @property
    def native(self) -> bool:
        """Whether looking up is a native call."""
        return is_native(self.weight)

    def record(self, tokens_T: torch.Tensor, recording: Recording) -> torch.Tensor:
        """The same in every replay of what is being recorded, where it is native."""
        if self.comm.size == 1:
            return self.weight[tokens_T]
        x_TH = self._held(tokens_T)
        self.comm.record_all_reduce(recording, x_TH)
        return x_TH

    def start(self, tokens_T: torch.Tensor) -> Handle[torch.Tensor]:
        """The same, under way. In a group of several only."""
        return self.comm.all_reduce(self._held(tokens_T), async_op=True)

    def _held(self, tokens_T: torch.Tensor) -> torch.Tensor:
        return embedding(tokens_T, self.weight, self.rows.start)
