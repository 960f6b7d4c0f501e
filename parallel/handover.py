"""The hand-over of hidden states between stages of unlike numbers of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator, Handle
from phalanx.parallel.split import Split, Transfer


class _Incoming(NamedTuple):
    """A hand-over that is awaited. share: this rank's part of it. sizes: elements of each rank's."""

    share: torch.Tensor
    sizes: tuple[int, ...]
    handles: list[Handle[torch.Tensor]]
    num_tokens: int


class HandOver:
    """One border of the pipeline, seen from a rank on either side of it.

    All ranks of the earlier stage hold the same hidden states. Each sends its share of the elements to the ranks of the
    later stage whose share they are, so that every value crosses the border once; the later stage then gathers the
    shares inside itself, where links are fast.
    """

    def __init__(self, comm: Communicator, senders: range, receivers: range, stage_comm: Communicator) -> None:
        """comm: reaches both stages; senders, receivers: their ranks in it. stage_comm: of this rank's own stage."""
        self._comm = comm
        self._senders = senders
        self._receivers = receivers
        self._stage_comm = stage_comm
        self._sending: list[Handle[torch.Tensor]] = []
        self._incoming: deque[_Incoming] = deque()

    def send(self, x: torch.Tensor) -> None:
        """Starts sending this rank's share of x; returns once the hand-over before it has left."""
        self.flush()
        flat = x.reshape(-1)
        for transfer in self._shares(flat.numel()):
            if self._senders[transfer.source] == self._comm.rank:
                share = flat[transfer.interval.slice]
                self._sending.append(self._comm.send(share, self._receivers[transfer.target], async_op=True))

    @property
    def num_expected(self) -> int:
        """Hand-overs expected and not yet received."""
        return len(self._incoming)

    def expect(self, num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes room for the next hidden states, [num_tokens, hidden_size], which may then come behind other work."""
        num_elements = num_tokens * hidden_size
        parts = Split.even(num_elements, len(self._receivers))
        own = parts[self._receivers.index(self._comm.rank)]
        share = torch.empty(own.size, dtype=dtype, device=device)
        handles = [
            self._comm.recv(
                share[transfer.interval.start - own.start : transfer.interval.stop - own.start],
                self._senders[transfer.source],
                async_op=True,
            )
            for transfer in self._shares(num_elements)
            if self._receivers[transfer.target] == self._comm.rank
        ]
        self._incoming.append(_Incoming(share, parts.sizes, handles, num_tokens))

    def receive(self) -> torch.Tensor:
        """The oldest hidden states expected, [num_tokens, hidden_size]."""
        incoming = self._incoming.popleft()
        for handle in incoming.handles:
            handle.wait()
        whole: torch.Tensor = self._stage_comm.all_gather(incoming.share, sizes=incoming.sizes)
        return whole.view(incoming.num_tokens, -1)

    def flush(self) -> None:
        """Waits until everything sent has left."""
        for handle in self._sending:
            handle.wait()
        self._sending.clear()

    def _shares(self, num_elements: int) -> Iterator[Transfer]:
        return Split.even(num_elements, len(self._senders)).transfers(Split.even(num_elements, len(self._receivers)))
