"""Transfers between machines, by one rank of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from phalanx.comm.combine import combine
from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.lane import LateError, left_s
from phalanx.comm.work import Work, all_of

# Up to here every machine sends all it has to every other, which takes one transfer's latency in place of two. Among 3
# machines of a 1 Gbit/s network, where a transfer takes 0.2 ms, the bytes saved are worth the second one from 40 KB.
WHOLE_BYTES = 64 * 1024


class Between:
    """A rank's transfers with one rank of each other machine.

    Of both sides the tags, above 1, are those of the collective that they are part of: what is sent for one is never
    taken for another.
    """

    def __init__(self, network: Communicator, machine: int, peers: Sequence[int]) -> None:
        """network: gloo, between all ranks. machine: this one's number. peers: a rank of each machine, by its number,
        on this one the caller itself.
        """
        self._network = network
        self._machine = machine
        self._peers = peers
        self._others = [number for number in range(len(peers)) if number != machine]
        self._spare: list[torch.Tensor] = []  # memory that was received into: new memory costs a fault a page

    def swap(
        self, sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], tag: int, deadline_s: float
    ) -> None:
        """Sends and receives at once, by number of the other machine; nothing is sent of tensors without elements."""
        _wait(self._start_swap(sent, received, tag), deadline_s)

    def combine(self, x: torch.Tensor, op: ReduceOp, tag: int, deadline_s: float) -> None:
        """Replaces `x` [elements] by the sum or maximum over the machines, with the same bits on all of them."""
        if self.is_one_swap(x):
            self.gather_combined(x, dict.fromkeys(self._others, x), op, tag, deadline_s)
            return
        parts = x.tensor_split(len(self._peers))
        mine, theirs = parts[self._machine], {machine: parts[machine] for machine in self._others}
        combining = self._start_gather_combined(mine, theirs, op, tag)
        # Where a receive stands already, gloo sends without asking first. A result overwrites only what its sender has
        # received.
        receiving = self._start_swap({}, theirs, tag)
        _wait(combining, deadline_s)
        _wait(all_of([self._start_swap(dict.fromkeys(self._others, mine), {}, tag), receiving]), deadline_s)

    def is_one_swap(self, x: torch.Tensor) -> bool:
        """Whether `combine` takes one transfer each way, so that `start_combine` may begin it."""
        return len(self._others) < 2 or x.nbytes <= WHOLE_BYTES

    def start_combine(self, x: torch.Tensor, op: ReduceOp, tag: int) -> Work:
        """As `combine`, begun at once: from here on the network is busy with it, and no thread of Python."""
        return self._start_gather_combined(x, dict.fromkeys(self._others, x), op, tag)

    def gather_combined(
        self, x: torch.Tensor, sent: Mapping[int, torch.Tensor], op: ReduceOp, tag: int, deadline_s: float
    ) -> None:
        """Replaces `x` by the sum or maximum of it and what each other machine sends here, in the order of machines.

        sent: to the others, in turn.
        """
        if self._others:
            _wait(self._start_gather_combined(x, sent, op, tag), deadline_s)

    def _start_gather_combined(self, x: torch.Tensor, sent: Mapping[int, torch.Tensor], op: ReduceOp, tag: int) -> Work:
        memory = self._take(x.nbytes * len(self._others))
        received = memory[: x.nbytes * len(self._others)].view(x.dtype).view(len(self._others), x.numel()).unbind()
        swapping = self._start_swap(sent, dict(zip(self._others, received, strict=True)), tag)
        return _Combining(swapping, partial(self._combine, x, received, op, memory))

    def _combine(self, x: torch.Tensor, received: Sequence[torch.Tensor], op: ReduceOp, memory: torch.Tensor) -> None:
        own = x if len(received) == 1 else x.clone()
        combine(x, [*received[: self._machine], own, *received[self._machine :]], op)
        self._spare.append(memory)

    def _start_swap(self, sent: Mapping[int, torch.Tensor], received: Mapping[int, torch.Tensor], tag: int) -> Work:
        start = self._network.start
        return all_of(
            [
                start(op, tensor, self._peers[machine], tag, async_op=True)
                for op, tensors in (("recv", received), ("send", sent))
                for machine, tensor in tensors.items()
                if tensor.numel()
            ]
        )

    def _take(self, num_bytes: int) -> torch.Tensor:
        """Memory of at least so many bytes, which comes back to `_spare` when what it holds was combined."""
        try:
            while (memory := self._spare.pop()).nbytes < num_bytes:
                continue
        except IndexError:
            with torch.inference_mode(False):  # so that it can be written to in that mode and outside
                memory = torch.empty(1 << num_bytes.bit_length(), dtype=torch.uint8)
        return memory


class _Combining:
    """A transfer, and what is done with what it brought."""

    __slots__ = ("_then", "_work")

    def __init__(self, work: Work, then: Callable[[], None]) -> None:
        self._work = work
        self._then = then

    def wait(self, timeout_s: float) -> bool:
        if not self._work.wait(timeout_s):
            return False
        self._then()
        return True


def _wait(work: Work, deadline_s: float) -> None:
    if not work.wait(left_s(deadline_s)):
        raise LateError
