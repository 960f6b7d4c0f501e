"""The communicator of ranks on several machines: a machine takes part as if it were one rank.

Ranks of a machine reach each other through shared memory. Between machines go the carriers, the first so many ranks of
each machine: every carrier has a share of what its machine sends, and exchanges it with the carriers of the same number
on the other machines.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch._C._distributed_c10d import PrefixStore

from phalanx.comm.between import Between
from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.group import GroupSpec
from phalanx.comm.lane import Job, Lane, LateError, left_s
from phalanx.comm.ledger import Ledger
from phalanx.comm.shm_native import create_shm
from phalanx.comm.single import SingleCommunicator
from phalanx.comm.torch_backend import GlooCommunicator
from phalanx.comm.wire import Wires
from phalanx.comm.work import Work
from phalanx.errors import CommError

# From here on all carriers have a share. Below, one carries all: a second one's wake-ups and messages cost more than
# sharing gains. 2 x 2 ranks on 2 cores take 1.5 ms for 128 KB by one carrier and 3.1 by two over 1 Gbit/s (0.9 and 1.2
# over an unshaped link), 4.8 and 4.1 for 512 KB (2.6 and 3.0), 20.6 and 20.1 for 2 MB (8.0 and 7.0).
SHARED_BYTES = 256 * 1024


class HierarchicalCommunicator(Communicator):
    """Composed of shared memory inside each machine and TCP between them, with any number of ranks on each.

    Every collective is one operation, with one number and one entry in the ledger, and takes one transfer a machine:
    of the tensor of a large all-reduce each of m machines sends 2 (m - 1) / m times the bytes. All ranks get the same
    bits. Sums of bfloat16 and float16 are added in float32 and rounded to their dtype twice: once inside each
    machine, which is what travels, and once after the sum over the machines. Sends and receives go by memory to ranks
    of the same machine, and through the network to others.

    Asynchronous collectives are done by a thread, in their order.
    """

    backend = "hierarchical"
    in_background = True

    def __init__(self, spec: GroupSpec) -> None:
        if spec.store is None:
            raise CommError(f"group {spec.name!r}: a group of {spec.size} needs a store to meet on")
        machines = spec.machines or (0,) * spec.size
        self._machine = machines[spec.rank]
        self._members = [
            [rank for rank in range(spec.size) if machines[rank] == machine] for machine in range(max(machines) + 1)
        ]
        here = self._members[self._machine]
        self._seat = here.index(spec.rank)
        self._most_carriers = min(len(members) for members in self._members)
        assert spec.address is not None, "a group with a store has an address"
        self._wires: Wires | None = None
        with ExitStack() as opened:
            # A segment serves one thread, and sends go on while the lane's thread is at a collective.
            self._inside = opened.enter_context(_join_inside(spec, here, "collectives"))
            self._beside = opened.enter_context(_join_inside(spec, here, "sends"))
            self._network = opened.enter_context(GlooCommunicator(_part_of(spec, "network", range(spec.size))))
            if self._seat < self._most_carriers:
                peers = [members[self._seat] for members in self._members]
                store = PrefixStore(f"wires/{self._seat}", spec.store)
                self._wires = Wires(store, spec.name, spec.address, self._machine, peers, spec.timeout_s)
            opened.pop_all()
        self._levels = (self._inside, self._beside, self._network)
        for level in self._levels:
            level._board.close()  # this communicator's own tells where its ranks wait
        super().__init__(spec)
        self._between: Between | None = None
        if self._wires is not None:
            self._between = Between(self._wires, self._machine, len(self._members))
        self._alone = self._between if len(here) == 1 else None
        # As with gloo, the limit of whoever waits must strike first.
        self._lane = Lane(f"phalanx-hierarchical-{spec.rank}", 2 * spec.timeout_s + 10)
        weakref.finalize(self, self._lane.stop)

    # ---- starting ----

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work:
        return self._collect(partial(self._all_reduce, x.view(-1), op, _tag("all_reduce", x)))

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        counts = _elements(output, sizes or [x.shape[0]] * self.size)
        return self._collect(partial(self._all_gather, output.view(-1), x.view(-1), counts, _tag("all_gather", output)))

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        counts = _elements(x, sizes or [output.shape[0]] * self.size)
        return self._collect(
            partial(self._reduce_scatter, output.view(-1), x.view(-1), counts, _tag("reduce_scatter", x))
        )

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        return self._collect(partial(self._broadcast, x.view(-1), root, _tag("broadcast", x)))

    def _start_barrier(self) -> Work:
        flag = torch.zeros(1, dtype=torch.uint8)
        return self._collect(partial(self._all_reduce, flag, "max", _tag("barrier", flag)))

    def _start_send(self, x: torch.Tensor, to: int) -> Work:
        level, number = self._reach(to)
        return level.start("send", x, number, async_op=self._in_background)

    def _start_recv(self, x: torch.Tensor, source: int) -> Work:
        level, number = self._reach(source)
        return level.start("recv", x, number, async_op=self._in_background)

    def _reach(self, rank: int) -> tuple[Communicator, int]:
        """What leads to a rank, and its number there."""
        here = self._members[self._machine]
        return (self._beside, here.index(rank)) if rank in here else (self._network, rank)

    def _collect(self, job: Job) -> Work:
        return self._lane.add(job, in_background=self._in_background)

    # ---- collectives, of tensors of one dimension; counts: elements of each rank ----

    def _all_reduce(self, x: torch.Tensor, op: ReduceOp, tag: int, deadline_s: float) -> None:
        if self._alone is not None:
            self._alone.combine(x, op, tag, deadline_s)
            return
        shares = self._shares(x.numel(), x.nbytes)
        share = x.new_empty(shares[self._seat])
        if op == "sum":
            self._do_inside("reduce_scatter", deadline_s, share, x, shares)
        else:
            self._do_inside("all_reduce", deadline_s, x, op)
            share.copy_(torch.split(x, shares)[self._seat])
        if self._between is not None:
            self._between.combine(share, op, tag, deadline_s)
        self._gather_inside(x, share, shares, deadline_s)

    def _all_gather(
        self, output: torch.Tensor, x: torch.Tensor, counts: list[int], tag: int, deadline_s: float
    ) -> None:
        parts = torch.split(output, counts)
        blocks = [_block(output, parts, members) for members in self._members]
        shares = [self._shares(block.numel(), output.nbytes) for block in blocks]
        own = blocks[self._machine]
        self._gather_inside(own, x, [counts[rank] for rank in self._members[self._machine]], deadline_s)
        others = [machine for machine in range(len(blocks)) if machine != self._machine]
        received = {
            machine: blocks[machine] if self._alone else output.new_empty(shares[machine][self._seat])
            for machine in others
        }
        if self._between is not None:
            sent = torch.split(own, shares[self._machine])[self._seat]
            self._between.swap(dict.fromkeys(others, sent), received, tag, deadline_s)
        for machine in others:
            self._gather_inside(blocks[machine], received[machine], shares[machine], deadline_s)
        for block, members in zip(blocks, self._members, strict=True):
            if not _is_run(members):
                for part, rank in zip(torch.split(block, [counts[rank] for rank in members]), members, strict=True):
                    parts[rank].copy_(part)

    def _reduce_scatter(
        self, output: torch.Tensor, x: torch.Tensor, counts: list[int], tag: int, deadline_s: float
    ) -> None:
        parts, here = torch.split(x, counts), self._members[self._machine]
        blocks = [_block(x, parts, members, filled=True) for members in self._members]
        shares = [self._shares(block.numel(), x.nbytes) for block in blocks]
        cut = [torch.split(block, share) for block, share in zip(blocks, shares, strict=True)]
        # For the seats of this machine in turn, what each is to sum for every machine.
        arranged = torch.cat([pieces[seat] for seat in range(len(here)) for pieces in cut])
        carried = [sum(share[seat] for share in shares) for seat in range(len(here))]
        summed = x.new_empty(carried[self._seat])
        self._do_inside("reduce_scatter", deadline_s, summed, arranged, carried)
        pieces = torch.split(summed, [share[self._seat] for share in shares])
        own = pieces[self._machine]
        if self._between is not None:
            sent = {machine: piece for machine, piece in enumerate(pieces) if machine != self._machine}
            self._between.gather_combined(own, sent, "sum", tag, deadline_s)
        block = x.new_empty(blocks[self._machine].numel())
        self._gather_inside(block, own, shares[self._machine], deadline_s)
        output.copy_(torch.split(block, [counts[rank] for rank in here])[self._seat])

    def _broadcast(self, x: torch.Tensor, root: int, tag: int, deadline_s: float) -> None:
        source = next(machine for machine, members in enumerate(self._members) if root in members)
        shares = self._shares(x.numel(), x.nbytes)
        share = torch.split(x, shares)[self._seat]
        if self._machine == source:
            self._do_inside("broadcast", deadline_s, x, self._members[source].index(root))
            if self._between is not None:
                others = [machine for machine in range(len(self._members)) if machine != source]
                self._between.swap(dict.fromkeys(others, share), {}, tag, deadline_s)
        else:
            received = x if self._alone else torch.empty_like(share)
            if self._between is not None:
                self._between.swap({}, {source: received}, tag, deadline_s)
            self._gather_inside(x, received, shares, deadline_s)

    def _shares(self, num_elements: int, num_bytes: int) -> list[int]:
        """Elements that each seat of this machine carries in an operation of so many bytes; of a carrier's number the
        same on all machines.
        """
        carriers = self._most_carriers if num_bytes >= SHARED_BYTES else 1
        bounds = [num_elements * seat // carriers for seat in range(carriers + 1)]
        shares = [stop - start for start, stop in pairwise(bounds)]
        return shares + [0] * (len(self._members[self._machine]) - carriers)

    def _gather_inside(self, output: torch.Tensor, x: torch.Tensor, counts: list[int], deadline_s: float) -> None:
        if output.numel() and output is not x:
            self._do_inside("all_gather", deadline_s, output, x, counts)

    def _do_inside(self, op: str, deadline_s: float, *arguments: object) -> None:
        if not self._inside.perform(op, left_s(deadline_s), *arguments):
            raise LateError

    def _abort(self) -> None:
        if self._wires is not None:
            self._wires.shut()
        for level in self._levels:
            level.abort()

    def _close(self) -> None:
        if self._wires is not None:
            self._wires.shut()  # for a job of the thread, if there is one
        self._lane.stop()
        if self._wires is not None:
            self._wires.close()
        for level in self._levels:
            level.close()


def _join_inside(spec: GroupSpec, here: Sequence[int], what: str) -> Communicator:
    part = _part_of(spec, what, here)
    return create_shm(part) if part.size > 1 else SingleCommunicator(part)


def _part_of(spec: GroupSpec, what: str, ranks: Sequence[int]) -> GroupSpec:
    """The place of this rank in a group of some of the ranks, which keeps no ledger that anybody reads."""
    assert spec.store is not None
    return replace(
        spec,
        rank=ranks.index(spec.rank),
        size=len(ranks),
        name=f"{spec.name} ({what} of ranks {', '.join(map(str, ranks))})",
        store=PrefixStore(f"{what}/{ranks[0]}", spec.store),
        ledger=Ledger(1),
        machines=(),
        numbers=tuple(ranks),
    )


def _tag(op: str, x: torch.Tensor) -> int:
    """What the messages of a collective are known by."""
    return zlib.crc32(f"{op} {x.nbytes} {x.dtype}".encode())


def _elements(x: torch.Tensor, rows: Sequence[int]) -> list[int]:
    """Of the rows of each rank, which are all rows of `x`."""
    row = x.numel() // x.shape[0]
    return [count * row for count in rows]


def _is_run(ranks: Sequence[int]) -> bool:
    """Whether they follow one another."""
    return ranks[-1] - ranks[0] + 1 == len(ranks)


def _block(
    whole: torch.Tensor, parts: Sequence[torch.Tensor], ranks: Sequence[int], *, filled: bool = False
) -> torch.Tensor:
    """The parts of some ranks as one: of `whole` where they follow one another, else a new one, filled if need be."""
    if _is_run(ranks):
        start = sum(len(part) for part in parts[: ranks[0]])
        return whole[start : start + sum(len(parts[rank]) for rank in ranks)]
    if filled:
        return torch.cat([parts[rank] for rank in ranks])
    return whole.new_empty(sum(len(parts[rank]) for rank in ranks))
