"""The communicator between processes of one machine, over memory that they share. For the CPU.

A collective is a sequence of rounds. In a round every rank fills its slot, raises its epoch, waits until the others
have raised theirs, and reads their slots. No round ends with a second meeting: a rank comes back to the place of a slot
only when every other has published a round that it could not have begun before it was done with that one (`Arena`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch

from phalanx.comm.combine import combine
from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.group import GroupSpec
from phalanx.comm.rendezvous import meet
from phalanx.comm.shm_arena import Arena
from phalanx.comm.shm_calls import (
    ALL_GATHER,
    ALL_REDUCE,
    BARRIER,
    BROADCAST,
    REDUCE_SCATTER,
    SEND,
    WINDOW,
    signature,
    unlike_error,
)
from phalanx.comm.shm_segment import HEADER_BYTES, NUM_RING, RING_BYTES, ROUND_BYTES, SMALL_BYTES, share_segment
from phalanx.comm.shm_stream import Helper, Steps, Stream
from phalanx.comm.shm_wait import Waiter, Watch
from phalanx.comm.work import Work
from phalanx.errors import CommError


class ShmCommunicator(Communicator):
    """Every rank adds in the order of ranks, so all get the same bits; bfloat16 and float16 are added in float32 and
    rounded once. Calls that do not match between ranks are refused with what each rank called.

    Asynchronous operations that one round settles are published at once and read in `wait`; longer ones, sends that
    find no room and receives that exceed what the sender can put down, are carried on by a thread.
    """

    backend = "shm"

    def __init__(self, spec: GroupSpec) -> None:
        if spec.store is None:
            raise CommError(f"group {spec.name!r}: a group of {spec.size} needs a store to meet on")
        meet(spec.store, spec.name, spec.rank, spec.size, spec.timeout_s)
        self._segment = segment = share_segment(spec, spec.store)
        self._waiter = Waiter(segment, spec)
        super().__init__(spec)
        rank = self.rank
        self._ranks = ranks = range(self.size)
        self._others = tuple(other for other in ranks if other != rank)
        self._words = segment.words
        self._typed = segment.typed
        self._arena = Arena(segment, rank)
        self._headers = [segment.arena(other) // 8 for other in ranks]
        self._data = [segment.arena(other) + HEADER_BYTES for other in ranks]
        self._epoch_word = segment.epoch(rank)
        self._all = Watch(tuple(segment.epoch(other) for other in self._others), self._others)
        self._one = [Watch((segment.epoch(other),), (other,)) for other in ranks]
        self._called = spec.called

        self._helper = Helper(f"phalanx-shm-{rank}")
        weakref.finalize(self, self._helper.stop)
        self._collectives = Stream(self._waiter, self._helper)
        self._sends = [Stream(self._waiter, self._helper) for _ in ranks]
        self._receives = [Stream(self._waiter, self._helper) for _ in ranks]
        self._num_posted_slots = [0] * self.size
        self._rings_to = [segment.ring(rank, other) for other in ranks]
        self._rings_from = [segment.ring(other, rank) for other in ranks]
        self._produced_to = [segment.produced(rank, other) for other in ranks]
        self._consumed_from = [segment.consumed(other, rank) for other in ranks]
        self._room = [Watch((segment.consumed(rank, other),), (other,)) for other in ranks]
        self._arrivals = [Watch((segment.produced(other, rank),), (other,)) for other in ranks]

    # ---- starting ----

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work:
        if self.size == 2 or x.nbytes <= SMALL_BYTES:
            return self._collect(self._all_reduce_whole(x.view(-1), op), x.nbytes)
        return self._collect(self._all_reduce_shared(x.view(-1), op))

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        row_bytes = output.nbytes // output.shape[0]
        counts = [rows * row_bytes for rows in sizes or [x.shape[0]] * self.size]
        steps = self._all_gather(_bytes(output), _bytes(x), counts, signature(ALL_GATHER, output))
        return self._collect(steps, max(counts))

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        row = x.numel() // x.shape[0]
        counts = [rows * row for rows in sizes or [output.shape[0]] * self.size]
        steps = self._reduce_scatter(output.view(-1), x.view(-1), counts)
        return self._collect(steps, self.size * max(counts) * x.itemsize)

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        steps = self._broadcast(_bytes(x), root, signature(BROADCAST, x, root))
        return self._collect(steps, x.nbytes)

    def _start_barrier(self) -> Work:
        return self._collect(self._meet(), 0)

    def _start_send(self, x: torch.Tensor, to: int) -> Work:
        steps = self._send(_bytes(x), to, signature(SEND, x))
        stream = self._sends[to]
        return stream.add(steps, begin=not stream.queue, hand_over=self._in_background)

    def _start_recv(self, x: torch.Tensor, source: int) -> Work:
        steps = self._recv(_bytes(x), source, signature(SEND, x))
        stream = self._receives[source]
        self._num_posted_slots[source] += -(-x.nbytes // RING_BYTES)
        # Whoever sends what was posted must be able to put it all down, even while this rank waits for something else.
        exceeds = self._num_posted_slots[source] - self._words[self._consumed_from[source]] > NUM_RING
        return stream.add(steps, begin=not stream.queue, hand_over=self._in_background and exceeds)

    def _collect(self, steps: Steps, num_bytes: int = ROUND_BYTES + 1) -> Work:
        """num_bytes: that the steps put down. Where a round holds them, they may be published behind other rounds that
        nobody has read yet.
        """
        stream = self._collectives
        num_ahead = len(stream.queue)
        one_round = num_bytes <= ROUND_BYTES
        if one_round:
            begin = num_ahead < WINDOW and (not num_ahead or stream.queue[-1].need is not None)
            begin = begin and self._waiter.reached(self._all, self._arena.needed(num_bytes))
        else:
            begin = not num_ahead
        return stream.add(steps, begin=begin, hand_over=self._in_background and not (one_round and begin))

    # ---- collectives ----

    @property
    def _epoch(self) -> int:
        """Rounds that this rank has published; in shared memory, where the native library counts them too."""
        return self._words[self._epoch_word]

    def _all_reduce_whole(self, x: torch.Tensor, op: ReduceOp) -> Steps:
        """Each rank reads all that the others hold. Of two ranks, sharing the sums out would only cost a round."""
        call = signature(ALL_REDUCE, x)
        for part in (x,) if x.nbytes <= ROUND_BYTES else torch.split(x, ROUND_BYTES // x.itemsize):
            at, needed = self._arena.take(part.nbytes)
            yield self._all, needed
            held = [self._part(at, rank, x.dtype, 0, len(part)) for rank in self._ranks]
            held[self.rank].copy_(part)
            yield self._all, self._publish(at, call)
            self._confirm(at, call)
            self._combine(part, held, op)

    def _all_reduce_shared(self, x: torch.Tensor, op: ReduceOp) -> Steps:
        """Each rank sums its share of a part, then all collect the shares. The sum takes the place, in the rank's own
        slot, of the one share there that no other rank reads.
        """
        call = signature(ALL_REDUCE, x)
        for part in torch.split(x, ROUND_BYTES // x.itemsize):
            at, needed = self._arena.take(part.nbytes)
            yield self._all, needed
            count = len(part)
            bounds = [count * rank // self.size for rank in range(self.size + 1)]
            start, stop = bounds[self.rank], bounds[self.rank + 1]
            own = self._part(at, self.rank, x.dtype, 0, count)
            own[:start].copy_(part[:start])
            own[stop:].copy_(part[stop:])
            yield self._all, self._publish(at, call)
            self._confirm(at, call)
            mine = part[start:stop]
            shares = [mine if rank == self.rank else self._part(at, rank, x.dtype, start, stop) for rank in self._ranks]
            self._combine(own[start:stop], shares, op)
            mine.copy_(own[start:stop])
            yield self._all, self._publish(at, call)
            for rank in self._others:
                start, stop = bounds[rank], bounds[rank + 1]
                part[start:stop].copy_(self._part(at, rank, x.dtype, start, stop))

    def _all_gather(self, output: torch.Tensor, x: torch.Tensor, counts: list[int], call: int) -> Steps:
        """counts: bytes of each rank."""
        starts = [0, *accumulate(counts)]
        output[starts[self.rank] : starts[self.rank + 1]].copy_(x)
        for done, size in _rounds(max(counts), ROUND_BYTES):
            at, needed = self._arena.take(size)
            yield self._all, needed
            if (count := min(size, counts[self.rank] - done)) > 0:
                self._part(at, self.rank, torch.uint8, 0, count).copy_(x[done : done + count])
            yield self._all, self._publish(at, call)
            self._confirm(at, call)
            for rank in self._others:
                if (count := min(size, counts[rank] - done)) > 0:
                    start = starts[rank] + done
                    output[start : start + count].copy_(self._part(at, rank, torch.uint8, 0, count))

    def _reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, counts: list[int]) -> Steps:
        """counts: elements of each rank. A slot holds a section for each rank."""
        call = signature(REDUCE_SCATTER, x)
        starts = [0, *accumulate(counts)]
        section_bytes = x.itemsize * self.size
        size = min(max(counts), ROUND_BYTES // section_bytes)
        for done in range(0, max(counts), max(1, size)):
            at, needed = self._arena.take(size * section_bytes)
            yield self._all, needed
            for rank in self._others:
                if (count := min(size, counts[rank] - done)) > 0:
                    section = self._part(at, self.rank, x.dtype, rank * size, rank * size + count)
                    section.copy_(x[starts[rank] + done :][:count])
            yield self._all, self._publish(at, call)
            self._confirm(at, call)
            if (count := min(size, counts[self.rank] - done)) > 0:
                start = self.rank * size
                parts = [
                    x[starts[rank] + done :][:count]
                    if rank == self.rank
                    else self._part(at, rank, x.dtype, start, start + count)
                    for rank in range(self.size)
                ]
                self._combine(output[done : done + count], parts, "sum")

    def _broadcast(self, x: torch.Tensor, root: int, call: int) -> Steps:
        for part in torch.split(x, ROUND_BYTES):
            at, needed = self._arena.take(len(part))
            yield self._all, needed
            data = self._part(at, root, torch.uint8, 0, len(part))
            if root == self.rank:
                data.copy_(part)
                self._publish(at, call)
            else:
                yield self._one[root], self._publish(at, call)
                self._confirm(at, call, (root,))
                part.copy_(data)

    def _meet(self) -> Steps:
        at, needed = self._arena.take(0)
        yield self._all, needed
        yield self._all, self._publish(at, BARRIER)
        self._confirm(at, BARRIER)

    # ---- between two ranks ----

    def _send(self, x: torch.Tensor, to: int, call: int) -> Steps:
        for part in torch.split(x, RING_BYTES):
            count = self._words[self._produced_to[to]]
            yield self._room[to], count + 1 - NUM_RING
            number = count % NUM_RING
            start = self._rings_to[to].data[number]
            self._typed[torch.uint8][start : start + len(part)].copy_(part)
            self._words[self._rings_to[to].headers[number]] = call
            self._words[self._produced_to[to]] = count + 1
            self._waiter.wake_if_awaiting(to)

    def _recv(self, x: torch.Tensor, source: int, call: int) -> Steps:
        for part in torch.split(x, RING_BYTES):
            count = self._words[self._consumed_from[source]]
            yield self._arrivals[source], count + 1
            number = count % NUM_RING
            header = self._words[self._rings_from[source].headers[number]]
            if header != call:
                raise unlike_error(self._called(source), header, call)
            start = self._rings_from[source].data[number]
            part.copy_(self._typed[torch.uint8][start : start + len(part)])
            self._words[self._consumed_from[source]] = count + 1
            self._waiter.wake_if_awaiting(source)

    # ---- rounds ----

    def _publish(self, at: int, call: int) -> int:
        """Announces what this rank has put into its slot; the epoch that the others will have done the same at."""
        words = self._words
        words[self._headers[self.rank] + at // 8] = call
        words[self._epoch_word] = epoch = self._epoch + 1
        self._waiter.wake_all_awaiting()
        return epoch

    def _confirm(self, at: int, call: int, ranks: tuple[int, ...] | None = None) -> None:
        """Raises RuntimeError where another rank has made another call in this round."""
        for rank in self._others if ranks is None else ranks:
            header = self._words[self._headers[rank] + at // 8]
            if header != call:
                raise unlike_error(self._called(rank), header, call)

    def _part(self, at: int, rank: int, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Elements of a rank's slot."""
        first = (self._data[rank] + at) // dtype.itemsize
        return self._typed[dtype][first + start : first + stop]

    def _combine(self, out: torch.Tensor, parts: Sequence[torch.Tensor], op: ReduceOp) -> None:
        """The sum or maximum of `parts`, in their order. `out` may be one of the first two, of more than two none."""
        combine(out, parts, op)

    def _abort(self) -> None:
        self._waiter.abort()

    def _close(self) -> None:
        self._waiter.leave()
        self._helper.stop()
        self._waiter.close()
        # The memory goes with the last reference to it.
        del (
            self._segment,
            self._waiter,
            self._collectives,
            self._sends,
            self._receives,
            self._words,
            self._typed,
            self._arena,
        )


def _rounds(total: int, most: int) -> Iterator[tuple[int, int]]:
    """(done before, size) of the rounds that move `total`."""
    for done in range(0, total, most):
        yield done, min(most, total - done)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)
