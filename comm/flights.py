"""Operations of one group that a GPU has under way, timed by events that are read later.

What is recorded on the caller's stream S, and what the ledger makes of it:

    blocking      S:  ──began─ transfer ─passed──►            exposed = total = began..passed
    asynchronous  S:  ──began─ compute ─reached─passed──►     exposed = reached..passed, total = began..passed
                                          (wait)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from phalanx.comm.board import Call
from phalanx.comm.ledger import Ledger

if TYPE_CHECKING:
    from phalanx.comm.gpu import Event, Gpu
    from phalanx.comm.stream_ordered import StreamWork

_MOST_UNREAD = 4096
_REANCHOR_S = 1.0  # the driver gives spans as float32 milliseconds: over one second they are good to 0.1 µs


class Done(NamedTuple):
    """A transfer that is over, as the ledger has it; times in seconds, by the ledger's clock."""

    call: Call
    layer: int
    began_s: float
    waited_s: float
    total_s: float


class Flight:
    """One operation. called_s: when it was called, by the ledger's clock. work: None until it has been enqueued."""

    __slots__ = ("began", "blocking", "call", "called_s", "layer", "passed", "reached", "settled", "step", "work")

    def __init__(self, call: Call, blocking: bool, ledger: Ledger, began: Event) -> None:
        self.call = call
        self.blocking = blocking
        self.step = ledger.step
        self.layer = ledger.layer
        self.called_s = ledger.clock_s()
        self.began = began
        self.reached: Event | None = began if blocking else None
        self.passed: Event | None = None
        self.work: StreamWork | None = None
        self.settled = False

    def is_done(self) -> bool:
        """Whether the transfer has ended, whatever the caller's stream is at."""
        if self.settled:
            return True
        if self.blocking and self.passed is not None:
            return self.passed.query()
        return self.work is not None and not self.blocking and self.work.is_done()

    def stalls(self) -> bool:
        """Whether the GPU waits for it: compute cannot go on before it is done."""
        return self.reached is not None and self.reached.query()

    def done(self, began_s: float) -> Iterator[Done]:
        """The transfers that it was, once it is over. began_s: when it began, by the ledger's clock."""
        assert self.reached is not None
        assert self.passed is not None
        waited_s, total_s = (each.elapsed_time(self.passed) / 1e3 for each in (self.reached, self.began))
        yield Done(self.call, self.layer, began_s, waited_s, total_s)


class Flights:
    """Those of one group. Everything but `unfinished` is called by the communicator's own thread."""

    def __init__(self, gpu: Gpu, ledger: Ledger, group: str) -> None:
        self._gpu = gpu
        self._ledger = ledger
        self._group = group
        self._unread: deque[Flight] = deque()
        self._new: deque[Flight] = deque()  # handed to the watchdog's thread, which alone reads the next
        self._pending: list[Flight] = []
        self._spare: list[Event] = []
        self._clock = _GpuClock()
        self.under_way = threading.Event()
        ledger.add_source(self.settle)

    def begin(self, call: Call, blocking: bool) -> Flight:
        flight = Flight(call, blocking, self._ledger, self.mark())
        self.add(flight)
        return flight

    def add(self, flight: Flight) -> None:
        """One that has begun."""
        if len(self._unread) >= _MOST_UNREAD:  # nobody reads the ledger
            self.settle()
        self._unread.append(flight)
        self._new.append(flight)
        if not self.under_way.is_set():
            self.under_way.set()

    def mark(self) -> Event:
        """A timed event, recorded on the current stream."""
        event = self._spare.pop() if self._spare else self._gpu.new_event(timed=True)
        event.record(self._gpu.current_stream())
        return event

    def settle(self) -> None:
        """Writes into the ledger what the GPU is through with, in the order of the calls. Never blocks."""
        while self._unread:
            flight = self._unread[0]
            if flight.passed is None or flight.reached is None or not flight.passed.query():
                return
            self._unread.popleft()
            flight.settled = True  # before its events are used again: the watchdog may still look at it
            total_s = flight.began.elapsed_time(flight.passed) / 1e3
            began_s = self._clock.locate(flight.began, flight.called_s, self._ledger.clock_s() - total_s)
            for done in flight.done(began_s):
                op, seq, peer, num_bytes = done.call
                times_s, place = (done.began_s, done.waited_s, done.began_s + done.total_s), (flight.step, done.layer)
                self._ledger.record(
                    seq, self._group, op, num_bytes, *times_s, peer=-1 if peer is None else peer, place=place
                )
            for event in {id(each): each for each in (flight.began, flight.reached, flight.passed)}.values():
                if event is not self._clock.anchor:
                    self._spare.append(event)

    def all_done(self) -> bool:
        return all(flight.is_done() for flight in self._unread)

    def unfinished(self) -> list[Flight]:
        """What is under way, in the order of the calls. For one thread only, the watchdog's."""
        self.under_way.clear()
        while self._new:
            self._pending.append(self._new.popleft())
        self._pending = [flight for flight in self._pending if not flight.is_done()]
        if self._pending:
            self.under_way.set()
        return self._pending

    def close(self) -> None:
        """Writes down what is done and forgets the rest."""
        self.settle()
        self._ledger.remove_source(self.settle)
        self._unread.clear()


class _GpuClock:
    """Places events of the GPU on the clock of the host, without ever waiting for one.

    An event is never before the call that recorded it nor after the moment at which it is found reached; the two bounds
    hold the estimate in place, however the clocks drift.
    """

    def __init__(self) -> None:
        self.anchor: Event | None = None
        self._anchor_s = 0.0

    def locate(self, event: Event, earliest_s: float, latest_s: float) -> float:
        if self.anchor is None:
            self.anchor, self._anchor_s = event, earliest_s
            return earliest_s
        span_s = self.anchor.elapsed_time(event) / 1e3
        at_s = max(min(self._anchor_s + span_s, latest_s), earliest_s)
        self._anchor_s = at_s - span_s
        if span_s > _REANCHOR_S:
            self.anchor, self._anchor_s = event, at_s
        return at_s
