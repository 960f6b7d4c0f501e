"""The hand-over of hidden states between stages of unlike numbers of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

import torch

from phalanx.comm.communicator import Communicator, Handle
from phalanx.comm.compress import Packing, Rows
from phalanx.parallel.split import Split, Transfer


class _Incoming(NamedTuple):
    """A hand-over that is awaited. share: this rank's part of it. sizes: elements of each rank's. parts: of the share,
    each with what brings it, and how that is packed where it is compressed.
    """

    share: torch.Tensor
    sizes: tuple[int, ...]
    parts: list[tuple[Handle[torch.Tensor], Packing | None, torch.Tensor]]
    num_tokens: int


class HandOver:
    """One border of the pipeline, seen from a rank on either side of it.

    All ranks of the earlier stage hold the same hidden states. Each sends its share of the elements to the ranks of the
    later stage whose share they are, so that every value crosses the border once; the later stage then gathers the
    shares inside itself, where links are fast. What goes to another machine may go in fewer bytes, see `comm.compress`;
    scales are those of whole tokens, wherever these are cut.
    """

    def __init__(
        self, comm: Communicator, senders: range, receivers: range, stage_comm: Communicator, compress: str = "none"
    ) -> None:
        """comm: reaches both stages; senders, receivers: their ranks in it. stage_comm: of this rank's own stage.
        compress: `none`, `int8` or `fp8`, for transfers between machines.
        """
        self._comm = comm
        self._senders = senders
        self._receivers = receivers
        self._stage_comm = stage_comm
        self._compress = compress
        self._sending: list[Handle[torch.Tensor]] = []
        self._incoming: deque[_Incoming] = deque()

    @property
    def num_compressed(self) -> int:
        """Pairs of ranks, one on either side, between which it compresses."""
        return sum(self._compresses(sender, receiver) for sender in self._senders for receiver in self._receivers)

    def send(self, x: torch.Tensor) -> None:
        """Starts sending this rank's share of x [tokens, hidden]; returns once the hand-over before it has left."""
        self.flush()
        own = self._comm.rank
        flat, width = x.reshape(-1), x.shape[-1]
        if any(self._compresses(own, receiver) for receiver in self._receivers):
            share = Split.even(flat.numel(), len(self._senders))[self._senders.index(own)]
            first_row = share.start // width
            rows = Rows.of(x[first_row : -(-share.stop // width)], self._compress)
        for transfer in self._shares(flat.numel()):
            receiver = self._receivers[transfer.target]
            if self._senders[transfer.source] != own:
                continue
            if self._compresses(own, receiver):
                message = Packing(*transfer.interval, width, self._compress).pack(rows, first_row)
            else:
                message = flat[transfer.interval.slice]
            self._sending.append(self._comm.send(message, receiver, async_op=True))

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
        incoming = []
        for transfer in self._shares(num_elements):
            source = self._senders[transfer.source]
            if self._receivers[transfer.target] != self._comm.rank:
                continue
            part = share[transfer.interval.start - own.start : transfer.interval.stop - own.start]
            packing, message = None, part
            if self._compresses(source, self._comm.rank):
                packing = Packing(*transfer.interval, hidden_size, self._compress)
                message = torch.empty(packing.num_bytes, dtype=torch.uint8, device=device)
            incoming.append((self._comm.recv(message, source, async_op=True), packing, part))
        self._incoming.append(_Incoming(share, parts.sizes, incoming, num_tokens))

    def receive(self) -> torch.Tensor:
        """The oldest hidden states expected, [num_tokens, hidden_size]."""
        incoming = self._incoming.popleft()
        for handle, packing, part in incoming.parts:
            message = handle.wait()
            if packing is not None:
                part.copy_(packing.unpack(message, part.dtype))
        whole: torch.Tensor = self._stage_comm.all_gather(incoming.share, sizes=incoming.sizes)
        return whole.view(incoming.num_tokens, -1)

    def flush(self) -> None:
        """Waits until everything sent has left."""
        for handle in self._sending:
            handle.wait()
        self._sending.clear()

    def _compresses(self, sender: int, receiver: int) -> bool:
        machines = self._comm.machines
        return self._compress != "none" and bool(machines) and machines[sender] != machines[receiver]

    def _shares(self, num_elements: int) -> Iterator[Transfer]:
        return Split.even(num_elements, len(self._senders)).transfers(Split.even(num_elements, len(self._receivers)))
