"""The communicator between processes of one machine, over memory that they share. For the CPU.

A collective is a sequence of rounds. In a round every rank fills its slot, raises its epoch, waits until the others
have raised theirs, and reads their slots. No round ends with a second meeting: slots alternate, and a rank comes back
to one only when every other has published a round that it could not have begun before it was done with that slot.
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
from phalanx.comm.shm_segment import (
    LARGE_BYTES,
    NUM_LARGE,
    NUM_RING,
    NUM_SMALL,
    RING_BYTES,
    SMALL_BYTES,
    Slots,
    share_segment,
)
from phalanx.comm.shm_stream import Helper, Steps, Stream
from phalanx.comm.shm_wait import Waiter, Watch
from phalanx.comm.work import Work
from phalanx.errors import CommError

_MAX_VIEWS = 64  # of a slot; a decode step uses one or two shapes


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
        rank, ranks = self.rank, range(self.size)
        self._others = tuple(other for other in ranks if other != rank)
        self._words = segment.words
        self._typed = segment.typed
        self._small = [segment.small(number) for number in range(NUM_SMALL)]
        self._large = [segment.large(number) for number in range(NUM_LARGE)]
        self._views: list[dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]]] = [{} for _ in self._small]
        self._epoch_word = segment.epoch(rank)
        self._large_rounds = segment.large_rounds(rank)
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
        if x.nbytes <= SMALL_BYTES:
            return self._collect(self._all_reduce_small(x, op), one_round=True)
        if self.size == 2:
            return self._collect(self._all_reduce_whole(x.view(-1), op), one_round=False)
        return self._collect(self._all_reduce_shared(x.view(-1), op), one_round=False)

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        row_bytes = output.nbytes // output.shape[0]
        counts = [rows * row_bytes for rows in sizes or [x.shape[0]] * self.size]
        steps = self._all_gather(_bytes(output), _bytes(x), counts, signature(ALL_GATHER, output))
        return self._collect(steps, one_round=max(counts) <= SMALL_BYTES)

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        row = x.numel() // x.shape[0]
        counts = [rows * row for rows in sizes or [output.shape[0]] * self.size]
        steps = self._reduce_scatter(output.view(-1), x.view(-1), counts)
        return self._collect(steps, one_round=self.size * max(counts) * x.itemsize <= SMALL_BYTES)

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        steps = self._broadcast(_bytes(x), root, signature(BROADCAST, x, root))
        return self._collect(steps, one_round=x.nbytes <= SMALL_BYTES)

    def _start_barrier(self) -> Work:
        return self._collect(self._meet(), one_round=True)

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

    def _collect(self, steps: Steps, *, one_round: bool) -> Work:
        stream = self._collectives
        num_ahead = len(stream.queue)
        if one_round:
            begin = num_ahead < WINDOW and self._waiter.reached(self._all, self._epoch + 1 - WINDOW)
            begin = begin and (not num_ahead or stream.queue[-1].need is not None)
        else:
            begin = not num_ahead
        return stream.add(steps, begin=begin, hand_over=self._in_background and not (one_round and begin))

    # ---- collectives ----

    @property
    def _epoch(self) -> int:
        """Rounds that this rank has published; in shared memory, where the native library counts them too."""
        return self._words[self._epoch_word]

    def _all_reduce_small(self, x: torch.Tensor, op: ReduceOp) -> Steps:
        yield self._all, self._epoch + 1 - WINDOW
        number = (self._epoch + 1) % NUM_SMALL
        slots = self._small[number]
        views = self._views[number].get((x.shape, x.dtype)) or self._make_views(number, x)
        views[self.rank].copy_(x)
        call = signature(ALL_REDUCE, x)
        yield self._all, self._publish(slots, call)
        self._confirm(slots, call)
        self._combine(x, views, op)

    def _all_reduce_whole(self, x: torch.Tensor, op: ReduceOp) -> Steps:
        """Of two ranks: each reads all of the other's. Sharing the sums out would save nothing, and cost a round."""
        (other,) = self._others
        call = signature(ALL_REDUCE, x)
        for part in torch.split(x, LARGE_BYTES // x.itemsize):
            yield self._all, self._epoch
            slots = self._large_slots()
            self._part(slots, self.rank, x.dtype, 0, len(part)).copy_(part)
            yield self._all, self._publish(slots, call)
            self._confirm(slots, call)
            self._combine(part, [part, self._part(slots, other, x.dtype, 0, len(part))], op)

    def _all_reduce_shared(self, x: torch.Tensor, op: ReduceOp) -> Steps:
        """Each rank sums its share of a part, then all collect the shares. The sum takes the place, in the rank's own
        slot, of the one share there that no other rank reads.
        """
        call = signature(ALL_REDUCE, x)
        for part in torch.split(x, LARGE_BYTES // x.itemsize):
            yield self._all, self._epoch
            slots = self._large_slots()
            count = len(part)
            bounds = [count * rank // self.size for rank in range(self.size + 1)]
            start, stop = bounds[self.rank], bounds[self.rank + 1]
            own = self._part(slots, self.rank, x.dtype, 0, count)
            own[:start].copy_(part[:start])
            own[stop:].copy_(part[stop:])
            yield self._all, self._publish(slots, call)
            self._confirm(slots, call)
            mine = part[start:stop]
            shares = [
                mine if rank == self.rank else self._part(slots, rank, x.dtype, start, stop)
                for rank in range(self.size)
            ]
            self._combine(own[start:stop], shares, op)
            mine.copy_(own[start:stop])
            yield self._all, self._publish(slots, call)
            for rank in self._others:
                start, stop = bounds[rank], bounds[rank + 1]
                part[start:stop].copy_(self._part(slots, rank, x.dtype, start, stop))

    def _all_gather(self, output: torch.Tensor, x: torch.Tensor, counts: list[int], call: int) -> Steps:
        """counts: bytes of each rank."""
        starts = [0, *accumulate(counts)]
        output[starts[self.rank] : starts[self.rank + 1]].copy_(x)
        for done, size, small in _rounds(max(counts), SMALL_BYTES, LARGE_BYTES):
            yield self._all, self._epoch + 1 - WINDOW if small else self._epoch
            slots = self._small_slots() if small else self._large_slots()
            if (count := min(size, counts[self.rank] - done)) > 0:
                self._part(slots, self.rank, torch.uint8, 0, count).copy_(x[done : done + count])
            yield self._all, self._publish(slots, call)
            self._confirm(slots, call)
            for rank in self._others:
                if (count := min(size, counts[rank] - done)) > 0:
                    start = starts[rank] + done
                    output[start : start + count].copy_(self._part(slots, rank, torch.uint8, 0, count))

    def _reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, counts: list[int]) -> Steps:
        """counts: elements of each rank. A slot holds a section for each rank."""
        call = signature(REDUCE_SCATTER, x)
        starts = [0, *accumulate(counts)]
        limits = [limit // (x.itemsize * self.size) for limit in (SMALL_BYTES, LARGE_BYTES)]
        for done, size, small in _rounds(max(counts), *limits):
            yield self._all, self._epoch + 1 - WINDOW if small else self._epoch
            slots = self._small_slots() if small else self._large_slots()
            for rank in self._others:
                if (count := min(size, counts[rank] - done)) > 0:
                    section = self._part(slots, self.rank, x.dtype, rank * size, rank * size + count)
                    section.copy_(x[starts[rank] + done :][:count])
            yield self._all, self._publish(slots, call)
            self._confirm(slots, call)
            if (count := min(size, counts[self.rank] - done)) > 0:
                start = self.rank * size
                parts = [
                    x[starts[rank] + done :][:count]
                    if rank == self.rank
                    else self._part(slots, rank, x.dtype, start, start + count)
                    for rank in range(self.size)
                ]
                self._combine(output[done : done + count], parts, "sum")

    def _broadcast(self, x: torch.Tensor, root: int, call: int) -> Steps:
        for done, size, small in _rounds(len(x), SMALL_BYTES, LARGE_BYTES):
            yield self._all, self._epoch + 1 - WINDOW if small else self._epoch
            slots = self._small_slots() if small else self._large_slots()
            part = x[done : done + size]
            data = self._part(slots, root, torch.uint8, 0, len(part))
            if root == self.rank:
                data.copy_(part)
                self._publish(slots, call)
            else:
                yield self._one[root], self._publish(slots, call)
                self._confirm(slots, call, (root,))
                part.copy_(data)

    def _meet(self) -> Steps:
        yield self._all, self._epoch + 1 - WINDOW
        slots = self._small_slots()
        yield self._all, self._publish(slots, BARRIER)
        self._confirm(slots, BARRIER)

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

    def _small_slots(self) -> Slots:
        return self._small[(self._epoch + 1) % NUM_SMALL]

    def _large_slots(self) -> Slots:
        self._words[self._large_rounds] = number = self._words[self._large_rounds] + 1
        return self._large[number % NUM_LARGE]

    def _publish(self, slots: Slots, call: int) -> int:
        """Announces what this rank has put into its slot; the epoch that the others will have done the same at."""
        words = self._words
        words[slots.headers[self.rank]] = call
        words[self._epoch_word] = epoch = self._epoch + 1
        self._waiter.wake_all_awaiting()
        return epoch

    def _confirm(self, slots: Slots, call: int, ranks: tuple[int, ...] | None = None) -> None:
        """Raises RuntimeError where another rank has made another call in this round."""
        words, headers = self._words, slots.headers
        for rank in self._others if ranks is None else ranks:
            if words[headers[rank]] != call:
                raise unlike_error(self._called(rank), words[headers[rank]], call)

    def _part(self, slots: Slots, rank: int, dtype: torch.dtype, start: int, stop: int) -> torch.Tensor:
        """Elements of a rank's slot."""
        first = slots.data[rank] // dtype.itemsize
        return self._typed[dtype][first + start : first + stop]

    def _make_views(self, number: int, x: torch.Tensor) -> list[torch.Tensor]:
        """Each rank's small slot as a tensor like `x`, kept for the next time: making them takes longer than a sum."""
        slots, views = self._small[number], self._views[number]
        if len(views) >= _MAX_VIEWS:
            views.clear()
        made = [self._part(slots, rank, x.dtype, 0, x.numel()).view(x.shape) for rank in range(self.size)]
        views[x.shape, x.dtype] = made
        return made

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
            self._views,
        )


def _rounds(total: int, small: int, large: int) -> Iterator[tuple[int, int, bool]]:
    """(done before, size, whether in a small slot) of the rounds that move `total`, of which a slot holds that much."""
    if total <= small:
        yield 0, total, True
        return
    for done in range(0, total, large):
        yield done, min(large, total), False


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1).view(torch.uint8)
