"""The ledger: what every transfer moved, and how long it kept its rank waiting."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from phalanx.comm.board import WaitBoard


class LedgerEntry(NamedTuple):
    """One finished operation. Times are on this rank, in microseconds.

    step, layer: as given to `begin_step` and `layer`, -1 before the first and outside of layers. seq: number of the
    operation in its group (see `Communicator`). num_bytes: of the tensor operated on, the longer one where input and
    result differ. started_us: on the ledger's clock. waited_us: blocked in starting or in `wait`: the exposed part.
    total_us: from the start until `wait` returned; an asynchronous operation that ended before it was waited for ended
    somewhere within. took_us: that the transfer itself was under way, without what it stood in line behind others of
    this rank, but with what it waited for other ranks; -1 where that is not known. Of operations ordered by a GPU's
    streams all times are the GPU's, read from events it has passed.
    """

    step: int
    layer: int
    seq: int
    group: str
    op: str
    num_bytes: int
    started_us: float
    waited_us: float
    total_us: float
    peer: int = -1
    last: int = -1
    took_us: float = -1.0

    @property
    def hidden_us(self) -> float:
        """Time that passed under other work: an upper bound of what the transfer took of it."""
        return self.total_us - self.waited_us


class OpTotals(NamedTuple):
    """Sums over operations of one kind."""

    num_ops: int
    num_bytes: int
    exposed_us: float
    hidden_us: float


class CommTotals(NamedTuple):
    """Sums over operations of one kind in one layer, -1 for what belongs to none, and one group, in microseconds and
    bytes.
    """

    layer: int
    op: str
    num_ops: int
    num_bytes: int
    exposed_us: float
    hidden_us: float
    group: str = ""


class LateTotals(NamedTuple):
    """What a rank waited for another one: for the last to arrive in a collective, for the other end of a recv or send.

    rank: that one, by its number in `group`.
    """

    group: str
    rank: int
    num_ops: int
    exposed_us: float


class Taken(NamedTuple):
    """What was recorded since the last time it was taken. num_lost: operations that are not in it, because newer ones
    took their place. entries: all that are, the oldest first, where they were asked for.
    """

    totals: tuple[CommTotals, ...]
    late: tuple[LateTotals, ...]
    num_lost: int
    entries: tuple[LedgerEntry, ...] = ()


UNKNOWN_S = -1e-6  # in place of a duration

# Of an entry, in its order, but for the times: started, waited and ended, and took, in seconds.
_Recorded = tuple[int, int, int, str, str, int, float, float, float, int, int, float]


class Ledger:
    """The last `capacity` operations of one rank, over all its groups.

    clock_s: the clock, in seconds. layer: of the model, that operations recorded from now on belong to; -1 for none.
    Recording takes well under a microsecond, so it is always on.
    """

    def __init__(self, capacity: int = 16384, clock_s: Callable[[], float] = time.perf_counter) -> None:
        self.clock_s = clock_s
        self.step = -1
        self.layer = -1
        self.boards: tuple[WaitBoard, ...] = ()  # of the groups that write here: what the rank waits for now
        self.num_recorded = 0
        self._num_taken = 0
        self._sources: list[Callable[[], None]] = []
        # Plain tuples: making a NamedTuple runs Python code, which is slow with cold caches, as between two layers.
        self._entries: deque[_Recorded] = deque(maxlen=capacity)

    def begin_step(self, step: int) -> None:
        """Operations recorded from now on belong to `step`."""
        self.step = step

    def add_source(self, settle: Callable[[], None]) -> None:
        """settle: called before the ledger is read, by its reader's thread, to record what is known only afterwards."""
        self._sources.append(settle)

    def follow(self, other: Ledger) -> None:
        """What another thread of the rank records in a ledger of its own comes into this one when it is read, as what
        the rank did not wait for.
        """

        def settle() -> None:
            while other._entries:
                step, layer, seq, group, op, size, start_s, _, end_s, peer, last, took_s = other._entries.popleft()
                self._entries.append((step, layer, seq, group, op, size, start_s, 0.0, end_s, peer, last, took_s))
                self.num_recorded += 1

        self.add_source(settle)

    def remove_source(self, settle: Callable[[], None]) -> None:
        if settle in self._sources:
            self._sources.remove(settle)

    def record(
        self,
        seq: int,
        group: str,
        op: str,
        num_bytes: int,
        started_s: float,
        waited_s: float,
        ended_s: float,
        peer: int = -1,
        last: int = -1,
        place: tuple[int, int] | None = None,
        took_s: float = UNKNOWN_S,
    ) -> None:
        """Writes down an operation. started_s, ended_s: by the ledger's clock. waited_s: seconds that it blocked.
        took_s: as `took_us` of an entry.

        place: (step, layer) that it belongs to where those are no longer the present ones.
        """
        self.num_recorded += 1
        step = self.step
        layer = self.layer
        if place is not None:
            step, layer = place
        self._entries.append((step, layer, seq, group, op, num_bytes, started_s, waited_s, ended_s, peer, last, took_s))

    @property
    def newest(self) -> LedgerEntry | None:
        """The operation that ended last. May be read from any thread."""
        return _entry(self._entries[-1]) if self._entries else None

    @property
    def num_dropped(self) -> int:
        """Operations recorded but no longer held, because newer ones took their place."""
        return self.num_recorded - len(self._entries)

    def entries(self, step: int | None = None) -> list[LedgerEntry]:
        """The operations held, in the order they ended; of one step only where `step` is given."""
        self._settle()
        return [_entry(each) for each in self._entries if step is None or each[0] == step]

    def since(self, num_recorded: int) -> list[LedgerEntry]:
        """What was recorded after the first so many operations, the oldest first, as far as it is held."""
        self._settle()
        new = list(islice(reversed(self._entries), self.num_recorded - num_recorded))
        return [_entry(each) for each in reversed(new)]

    def take(self, *, whole: bool = False) -> Taken:
        """Totals of what was recorded since the last call, by layer, operation and group, and by who was waited for;
        of no more than is still held. whole: with the entries themselves.
        """
        self._settle()
        totals: dict[tuple[int, str, str], list[float]] = {}
        late: dict[tuple[str, int], list[float]] = {}
        num_new = self.num_recorded - self._num_taken
        num_held = min(num_new, len(self._entries))
        self._num_taken = self.num_recorded
        recorded = list(islice(reversed(self._entries), num_held))
        for _, layer, _, group, op, size, start_s, waited_s, end_s, peer, last, _ in recorded:
            sums = totals.setdefault((layer, op, group), [0, 0, 0.0, 0.0])
            sums[0] += 1
            sums[1] += size
            sums[2] += waited_s
            sums[3] += end_s - start_s - waited_s
            if (other := max(peer, last)) >= 0:
                waits = late.setdefault((group, other), [0, 0.0])
                waits[0] += 1
                waits[1] += waited_s
        return Taken(
            tuple(
                CommTotals(layer, op, int(count), int(size), exposed_s * 1e6, hidden_s * 1e6, group)
                for (layer, op, group), (count, size, exposed_s, hidden_s) in totals.items()
            ),
            tuple(LateTotals(*key, int(count), waited_s * 1e6) for key, (count, waited_s) in late.items()),
            num_new - num_held,
            tuple(_entry(each) for each in reversed(recorded)) if whole else (),
        )

    def summary(self, step: int | None = None) -> dict[str, OpTotals]:
        """Totals by operation over the entries held; of one step only where `step` is given."""
        totals: dict[str, OpTotals] = {}
        for entry in self.entries(step):
            so_far = totals.get(entry.op, OpTotals(0, 0, 0.0, 0.0))
            totals[entry.op] = OpTotals(
                so_far.num_ops + 1,
                so_far.num_bytes + entry.num_bytes,
                so_far.exposed_us + entry.waited_us,
                so_far.hidden_us + entry.hidden_us,
            )
        return totals

    def _settle(self) -> None:
        for settle in self._sources:
            settle()


def _entry(recorded: _Recorded) -> LedgerEntry:
    step, layer, seq, group, op, size, start_s, waited_s, end_s, peer, last, took_s = recorded
    times_us = start_s * 1e6, waited_s * 1e6, (end_s - start_s) * 1e6
    return LedgerEntry(step, layer, seq, group, op, size, *times_us, peer, last, took_s * 1e6)
