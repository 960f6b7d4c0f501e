"""The language-model head that the first stage and the last share, each with some of the vocabulary rows.

For every token drawn the head is read as a whole, and of a small model it is as much as many layers: no deal of layers
fits prompts, of which one token passes it, and decoding, of which all do. So the last stage hands on the rows behind
its final norm, and makes its part of their logits while the first stage makes the other. Where embeddings are tied the
first stage has these rows of the head as it is. (Yeung et al., "Balancing Pipeline Parallelism with Vocabulary
Parallelism", 2024, cut the head over all stages.)

Where the largest logit of each row is all that is wanted, its number and value come back in place of all of them, eight
bytes a row: over 1 Gbit/s the logits of 16 rows take 6 ms.

Shapes: B rows whose next token is wanted, H hidden size, V vocabulary rows of this tensor rank, in both stages.
"""

from __future__ import annotations

import threading
from queue import SimpleQueue
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator
from phalanx.kernels import argmax_keys
from phalanx.parallel.layers import ColumnParallelLinear

END_S = 1.0  # that a thread may take to notice that its group has ended


class HeadAsker:
    """A rank of the last stage, which has the first of its vocabulary rows itself."""

    def __init__(self, comm: Communicator, helper: int, num_asked: int) -> None:
        """helper: the rank in `comm` that has the other rows, `num_asked`."""
        self._comm = comm
        self._helper = helper
        self._num_asked = num_asked

    def logits(self, normed_BH: torch.Tensor, own: ColumnParallelLinear) -> torch.Tensor:
        """[B, V]; own: makes the first of them."""
        self._comm.send(normed_BH, self._helper)
        num_own = own.num_outputs
        logits_BV = normed_BH.new_empty(len(normed_BH), num_own + self._num_asked)
        logits_BV[:, :num_own] = own(normed_BH)
        asked = normed_BH.new_empty(len(normed_BH), self._num_asked)
        logits_BV[:, num_own:] = self._comm.recv(asked, self._helper)
        return logits_BV

    def largest_keys(self, normed_BH: torch.Tensor, own: ColumnParallelLinear, first: int) -> torch.Tensor:
        """The key of each row's largest logit, [B] int64; first: the token of the first of `own`'s rows."""
        self._comm.send(normed_BH, self._helper)
        own_B = argmax_keys(own(normed_BH), first)
        return torch.maximum(own_B, self._comm.recv(torch.empty_like(own_B), self._helper))


class _Asked(NamedTuple):
    step: int
    shape: tuple[int, int]
    dtype: torch.dtype
    keys: bool


class HeadHelper:
    """A rank of the first stage, and a thread of its own that answers whenever rows come.

    A step that the stage is at takes as long as it takes, and the last stage waits: so the thread has the core in
    between, and the layers go on behind it.
    """

    def __init__(self, comm: Communicator, asker: int) -> None:
        """comm: is used from that thread only, and closed here; its ledger is the thread's own."""
        self._comm = comm
        self._asker = asker
        self._asked: SimpleQueue[_Asked | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def start(self, own: ColumnParallelLinear, first: int) -> None:
        """own: makes this rank's part of the logits. first: the token of the first of its rows."""
        self._thread = threading.Thread(target=self._serve, args=(own, first), name="phalanx-head", daemon=True)
        self._thread.start()

    def expect(self, step: int, shape: tuple[int, int], dtype: torch.dtype, *, keys: bool) -> None:
        """Of a step such rows will come, [B, H], after those that are expected by now. Raises what has ended the
        thread.

        keys: whether only each row's largest logit is asked for.
        """
        self.check()
        self._asked.put(_Asked(step, shape, dtype, keys))

    def check(self) -> None:
        """Raises what has ended the thread, if anything has."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Returns when all that is expected is answered. Raises what has ended the thread before."""
        if self._thread is not None:
            self._asked.put(None)
            self._thread.join()
        self.check()

    def close(self) -> None:
        """Ends the thread wherever it is, and leaves the group."""
        if self._thread is not None and self._thread.is_alive():
            self._asked.put(None)
            self._comm.abort()
            self._thread.join(END_S)
            if self._thread.is_alive():
                return  # in a product: the memory that it writes to is its own as long as the process lasts
        self._comm.close()

    @torch.inference_mode()
    def _serve(self, own: ColumnParallelLinear, first: int) -> None:
        try:
            while (asked := self._asked.get()) is not None:
                self._comm.ledger.begin_step(asked.step)
                rows_BH = self._comm.recv(torch.empty(asked.shape, dtype=asked.dtype), self._asker)
                logits = own(rows_BH)
                self._comm.send(argmax_keys(logits, first) if asked.keys else logits, self._asker)
        except Exception as error:  # for the rank's own thread to raise
            self._error = error
            self._comm.abort()
