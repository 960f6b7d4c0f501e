"""Transfers between machines, by one rank of each."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from phalanx.comm.combine import combine
from phalanx.comm.communicator import ReduceOp
from phalanx.comm.wire import Wires

# Up to here every machine sends all it has to every other, which takes one transfer's latency in place of two. Among 3
# machines of a 1 Gbit/s network, where a transfer takes 0.2 ms, the bytes saved are worth the second one from 40 KB.
WHOLE_BYTES = 64 * 1024


class Between:
    """A rank's transfers with one rank of each other machine.

    Of both sides the tags are those of the collective that they are part of: what is sent for one is never taken for
    another.
    """

    def __init__(self, wires: Wires, machine: int, num_machines: int) -> None:
        """machine: this one's number."""
        self._machine = machine
        self._num_machines = num_machines
        self._others = [number for number in range(num_machines) if number != machine]
        self._spare = torch.empty(0, dtype=torch.uint8)  # received into again: new memory costs a fault a page
        self.swap = wires.swap

    def combine(self, x: torch.Tensor, op: ReduceOp, tag: int, deadline_s: float) -> None:
        """Replaces `x` [elements] by the sum or maximum over the machines, with the same bits on all of them."""
        others = self._others
        if len(others) < 2 or x.nbytes <= WHOLE_BYTES:
            self.gather_combined(x, dict.fromkeys(others, x), op, tag, deadline_s)
            return
        parts = x.tensor_split(self._num_machines)
        mine, theirs = parts[self._machine], {machine: parts[machine] for machine in others}
        self.gather_combined(mine, theirs, op, tag, deadline_s)
        self.swap(dict.fromkeys(others, mine), theirs, tag, deadline_s)

    def gather_combined(
        self, x: torch.Tensor, sent: Mapping[int, torch.Tensor], op: ReduceOp, tag: int, deadline_s: float
    ) -> None:
        """Replaces `x` by the sum or maximum of it and what each other machine sends here, in the order of machines.

        sent: to the others, in turn.
        """
        if not self._others:
            return
        received = self._received(x)
        self.swap(sent, dict(zip(self._others, received, strict=True)), tag, deadline_s)
        own = x if len(received) == 1 else x.clone()
        combine(x, [*received[: self._machine], own, *received[self._machine :]], op)

    def _received(self, x: torch.Tensor) -> list[torch.Tensor]:
        """As many as there are other machines, each like x; good until the next call."""
        num_bytes = x.nbytes * len(self._others)
        if self._spare.nbytes < num_bytes:
            with torch.inference_mode(False):  # so that it can be written to in that mode and outside
                self._spare = torch.empty(1 << num_bytes.bit_length(), dtype=torch.uint8)
        return list(self._spare[:num_bytes].view(x.dtype).view(len(self._others), x.numel()).unbind())
