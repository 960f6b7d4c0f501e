"""Drawn tokens on their way from the last stage to the first, without the engine."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from phalanx.comm.communicator import Communicator, Handle
from phalanx.engine.vocab_shard import on_device


class _Expected(NamedTuple):
    step: int
    slots: torch.Tensor
    handle: Handle[torch.Tensor]


class TokenSender:
    """A rank of the last stage. Each rank of the first stage hears from one of them."""

    def __init__(self, comm: Communicator, senders: range, receivers: range) -> None:
        """comm: reaches both stages; senders, receivers: their ranks in it."""
        self._comm = comm
        own = senders.index(comm.rank)
        self._receivers = [rank for index, rank in enumerate(receivers) if index % len(senders) == own]
        self._sending: list[Handle[torch.Tensor]] = []

    def send(self, tokens: torch.Tensor) -> None:
        """tokens: [B] int64, drawn by a step. The first stage has been ready for them since it ran that step."""
        for handle in self._sending:
            handle.wait()
        self._sending = [self._comm.send(tokens, rank, async_op=True) for rank in self._receivers]


class TokenReceiver:
    """A rank of the first stage. Receives are posted ahead, and waited for when a step needs their tokens."""

    def __init__(self, comm: Communicator, senders: range, receivers: range, most_expected: int) -> None:
        """most_expected: steps whose tokens may be on their way; those of earlier ones are here."""
        self._comm = comm
        self._most_expected = most_expected
        self._source = senders[receivers.index(comm.rank) % len(senders)]
        self._expected: deque[_Expected] = deque()
        self._drawn_in: dict[int, int] = {}  # the step that drew last for each slot

    def expect(self, step: int, slots: Sequence[int]) -> None:
        """Posts the receipt of the tokens that `step` draws for `slots`."""
        if slots:
            self._drawn_in.update(dict.fromkeys(slots, step))
            tokens = torch.empty(len(slots), dtype=torch.int64, device=self._comm.device)
            rows = on_device(np.array(slots), tokens)
            self._expected.append(_Expected(step, rows, self._comm.recv(tokens, self._source, async_op=True)))

    def collect(self, slots: Sequence[int], last_tokens: torch.Tensor) -> None:
        """Waits until the last tokens of `slots` are here, and writes down all that came in `last_tokens`."""
        newest = max([self._drawn_in[slot] for slot in slots], default=-1)
        while self._expected and (self._expected[0].step <= newest or len(self._expected) > self._most_expected):
            expected = self._expected.popleft()
            last_tokens[expected.slots] = expected.handle.wait()
