"""Transfers that a CUDA graph replays: numbered, written down and watched as if they were called each time.

To the watchdog a replay is one operation of the group, with marks before and behind it, from the first of its transfers
on. When each of them ran only marks within the graph could tell, which cost time in every replay, and which the next
replay, enqueued before the last has ended, records anew. So what is to be replayed is captured twice: as it is, and
with two timed events around each transfer. The first replay is of the second kind, and from then on the next one that
begins `TIMED_EVERY_S` after the last of them, once that was read. To the transfers of all others the ledger gives the
times of the last one that was read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from phalanx.comm.board import Call
from phalanx.comm.flights import Done, Flight
from phalanx.comm.ledger import Ledger
from phalanx.kernels import Graph

if TYPE_CHECKING:
    from phalanx.comm.gpu import Event, Gpu

TIMED_EVERY_S = 1.0


class Marked:
    """Transfers as they are captured, with the marks that a replay records."""

    def __init__(self, gpu: Gpu, ledger: Ledger) -> None:
        self._gpu = gpu
        self._ledger = ledger
        self.flights: list[Flight] = []

    def begin(self, call: Call, blocking: bool) -> Flight:
        flight = Flight(call, blocking, self._ledger, self.mark())
        self.flights.append(flight)
        return flight

    def mark(self) -> Event:
        event = self._gpu.new_event(timed=True, external=True)
        event.record(self._gpu.current_stream())
        return event


class Replay(Flight):
    """One replay under way. num_before: collectives that the group had started before."""

    __slots__ = ("graph", "num_before", "timed")

    def __init__(self, graph: WatchedGraph, num_before: int, timed: bool, ledger: Ledger, began: Event) -> None:
        first, count = graph.calls[0], len(graph.calls)
        what = first[0] if count == 1 else f"{count} captured transfers from {first[0]}"
        call = what, num_before + first[1], None, sum(call[3] for call in graph.calls)
        super().__init__(call, True, ledger, began)
        self.graph = graph
        self.num_before = num_before
        self.timed = timed

    def done(self, began_s: float) -> Iterator[Done]:
        if self.timed:
            self.graph.read(self.began)
        for call, layer, times_s in zip(self.graph.calls, self.graph.layers, self.graph.times_s, strict=True):
            op, number, peer, num_bytes = call
            after_s, waited_s, total_s = times_s
            yield Done((op, self.num_before + number, peer, num_bytes), layer, began_s + after_s, waited_s, total_s)


class WatchedGraph:
    """A `Graph` with collectives of one group in it.

    plain, timed: the same work, captured without marks and with those of `marked`. num_before, num_after: collectives
    that were counted before the capture and after it. replaying: runs one of them as an operation of the group.
    """

    def __init__(
        self,
        plain: Graph,
        timed: Graph,
        marked: Marked,
        num_before: int,
        num_after: int,
        ledger: Ledger,
        replaying: Callable[[WatchedGraph, bool], None],
    ) -> None:
        self.plain = plain
        self.timed = timed
        # Numbered from 1 in the graph.
        self.calls: list[Call] = [
            (op, seq - num_before, peer, num_bytes)
            for op, seq, peer, num_bytes in (flight.call for flight in marked.flights)
        ]
        self.layers = [flight.layer for flight in marked.flights]
        self.num_calls = num_after - num_before
        self.times_s = [(0.0, 0.0, 0.0)] * len(self.calls)  # of each: from the beginning, waited, in all
        self._flights = marked.flights
        self._ledger = ledger
        self._replaying = replaying
        self._is_read = True
        self._timed_at_s = -math.inf

    def replay(self) -> None:
        now_s = self._ledger.clock_s()
        timed = self._is_read and now_s >= self._timed_at_s + TIMED_EVERY_S
        if timed:
            self._is_read, self._timed_at_s = False, now_s
        self._replaying(self, timed)

    def read(self, began: Event) -> None:
        """What the marks of the last timed replay say, which began with that event and is over."""
        self.times_s = [_times_s(began, flight) for flight in self._flights]
        self._is_read = True


def _times_s(began: Event, flight: Flight) -> tuple[float, float, float]:
    """From the replay's beginning to the transfer's, waited for it, and from its beginning to its end."""
    after_s = began.elapsed_time(flight.began) / 1e3
    if flight.passed is None or flight.reached is None:  # nobody waits for it
        return after_s, 0.0, 0.0
    return after_s, flight.reached.elapsed_time(flight.passed) / 1e3, flight.began.elapsed_time(flight.passed) / 1e3
