"""The residual stream between the blocks of a stage: four ways from a row-parallel product to the next block's input.

What a block computes is summed over the ranks, added to the stream, and normalised for the next block. A stream does
that for some tokens of a step; how, and so which transfers are hidden, is decided in `parallel/overlap.py`.

Shapes: T tokens, H hidden size, I input columns of this rank.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch

from phalanx.comm.communicator import Communicator, Handle
from phalanx.kernels import Activations, Norm, Recording, add_normed, add_rms_norm, normed, plain_norm, rms_norm
from phalanx.parallel.layers import RowParallelSum


class ResidualStream(Protocol):
    """A block reads `normed`, and what it makes of it is given to `add`, in turns."""

    def normed(self) -> Activations:
        """The stream behind the norm given last, [T, H]; waits for sums that are under way."""
        ...

    def add(self, out: RowParallelSum, x_TI: Activations, norm: Norm | None) -> None:
        """Adds what `out` makes of x, of all ranks. norm: that follows, None for none."""
        ...

    def whole(self) -> torch.Tensor:
        """The stream itself, [T, H], on every rank; once nothing more is added."""
        ...


class WholeStream:
    """One operation of the communicator after each block: sum, addition and norm. It hides nothing."""

    def __init__(self, x_TH: torch.Tensor, norm: Norm, eps: float) -> None:
        self._eps = eps
        self._x_TH = x_TH
        self._normed_TH: Activations = normed(x_TH, norm, eps)

    def normed(self) -> Activations:
        return self._normed_TH

    def add(self, out: RowParallelSum, x_TI: Activations, norm: Norm | None) -> None:
        if norm is None:
            self._x_TH = self._x_TH + out(x_TI)
        else:
            self._normed_TH, self._x_TH = out.add_and_norm(x_TI, self._x_TH, norm, self._eps)

    def whole(self) -> torch.Tensor:
        return self._x_TH


class RecordedStream(WholeStream):
    """The same, while it is recorded."""

    def __init__(self, x_TH: torch.Tensor, norm: Norm, eps: float, recording: Recording) -> None:
        super().__init__(x_TH, norm, eps)
        self._recording = recording

    def add(self, out: RowParallelSum, x_TI: Activations, norm: Norm | None) -> None:
        y_TH, before_TH = out.part(x_TI), self._x_TH
        if norm is not None and out.bias is None:
            self._normed_TH, self._x_TH = out.comm.record_fused_all_reduce_rms_norm(
                self._recording, y_TH, before_TH, plain_norm(norm), self._eps
            )
            return
        sum_TH = self._x_TH = torch.empty_like(before_TH)
        ledger, layer = out.comm.ledger, out.comm.ledger.layer

        def reduce() -> None:
            ledger.layer = layer
            torch.add(before_TH, out.biased(out.comm.all_reduce(y_TH)), out=sum_TH)

        self._recording.by_hand(reduce)
        if norm is not None:
            self._normed_TH = normed(sum_TH, norm, self._eps)


class ChunkedStream(WholeStream):
    """The product of a block is cut into chunks of tokens, whose sums travel while the next ones are computed."""

    def __init__(self, x_TH: torch.Tensor, norm: Norm, eps: float, num_chunks: int) -> None:
        super().__init__(x_TH, norm, eps)
        self._num_chunks = num_chunks

    def add(self, out: RowParallelSum, x_TI: Activations, norm: Norm | None) -> None:
        y_TH = out.biased(reduce_in_chunks(out, x_TI, self._num_chunks))
        if norm is None:
            self._x_TH = self._x_TH + y_TH
        else:
            self._normed_TH, self._x_TH = add_normed(y_TH, self._x_TH, norm, self._eps)


class PendingStream:
    """The sum is under way until the next block of these tokens asks for it: time for other tokens' block."""

    def __init__(self, x_TH: torch.Tensor | Handle[torch.Tensor], norm: Norm, eps: float) -> None:
        """x_TH: may be under way, too."""
        self._eps = eps
        self._x_TH = x_TH
        self._norm: Norm | None = norm
        self._pending: tuple[RowParallelSum, Handle[torch.Tensor]] | None = None

    def normed(self) -> Activations:
        if self._norm is None:
            raise RuntimeError("the last block of a stage has none behind it")
        if self._pending is None:
            return normed(self.whole(), self._norm, self._eps)
        normed_TH, self._x_TH = add_normed(self._arrived(), self._started(), self._norm, self._eps)
        return normed_TH

    def add(self, out: RowParallelSum, x_TI: Activations, norm: Norm | None) -> None:
        self._norm = norm
        self._pending = out, out.comm.all_reduce(out.part(x_TI), async_op=True)

    def whole(self) -> torch.Tensor:
        x_TH = self._started()
        if self._pending is not None:
            self._x_TH = x_TH = x_TH + self._arrived()
        return x_TH

    def _started(self) -> torch.Tensor:
        if isinstance(self._x_TH, Handle):
            self._x_TH = self._x_TH.wait()
        return self._x_TH

    def _arrived(self) -> torch.Tensor:
        assert self._pending is not None
        out, handle = self._pending
        self._pending = None
        return out.biased(handle.wait())


class ScatteredStream:
    """Each rank keeps and normalises the stream of its own tokens: reduce-scatter, norm, all-gather (Korthikanti et al.
    2022, arXiv 2205.05198).
    """

    def __init__(self, x_TH: torch.Tensor, norm: Norm, eps: float, comm: Communicator) -> None:
        bounds = [len(x_TH) * rank // comm.size for rank in range(comm.size + 1)]
        self._eps = eps
        self._comm = comm
        self._sizes = [stop - start for start, stop in pairwise(bounds)]
        self._shard = x_TH[bounds[comm.rank] : bounds[comm.rank + 1]]
        self._normed_TH = rms_norm(x_TH, plain_norm(norm), eps)

    def normed(self) -> Activations:
        return self._normed_TH

    def add(self, out: RowParallelSum, x_TI: Activations, norm: Norm | None) -> None:
        mine = self._comm.reduce_scatter(out.part(x_TI), sizes=self._sizes)
        if norm is None:
            self._shard = self._shard + out.biased(mine)
        else:
            normed_TH, self._shard = add_rms_norm(out.biased(mine), self._shard, plain_norm(norm), self._eps)
            self._normed_TH = self._gather(normed_TH)

    def whole(self) -> torch.Tensor:
        return self._gather(self._shard)

    def _gather(self, shard: torch.Tensor) -> torch.Tensor:
        return self._comm.all_gather(shard.contiguous(), sizes=self._sizes)


def reduce_in_chunks(out: RowParallelSum, x_TI: Activations, num_chunks: int) -> torch.Tensor:
    """What `out` makes of x, summed over the ranks without the bias, each chunk of tokens behind the next one."""
    parts = x_TI.tensor_split(num_chunks)
    under_way = [out.comm.all_reduce(out.part(part), async_op=True) for part in parts]
    return torch.cat([handle.wait() for handle in under_way])
