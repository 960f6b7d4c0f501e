"""What communicators of GPUs have in common: results ordered by streams, waits bounded by a thread that only looks.

A call enqueues and returns. `wait` makes the current stream wait, not the thread:

    thread       call ─────────── wait ──────── next kernel ...            (runs ahead of the GPU)
    compute  S   ──●ready──────────┆──(stall)───►──next kernel──►
                    ╲                         ╱
    transfer C       ╰──►── transfer ──●done─╯

So an operation that never ends keeps the GPU waiting while the thread notices nothing, until it copies a result. The
watchdog notices: it looks every now and then at the events of what is under way, and ends a group whose operation has
kept a stream waiting for longer than the limit. Its streams then run on with unfinished data; that is why a result
copied to the host is good only if `check` returns after the copy.
"""

from __future__ import annotations

import threading
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar, cast

from phalanx.comm.board import Call
from phalanx.comm.captured import Marked, Replay, WatchedGraph
from phalanx.comm.communicator import Communicator, Handle
from phalanx.comm.flights import Flight, Flights
from phalanx.comm.gpu import Gpu
from phalanx.comm.group import GroupSpec
from phalanx.comm.work import GroupBrokenError, Work
from phalanx.errors import CommError
from phalanx.kernels import Graph, Graphs

Result = TypeVar("Result")

_BROKEN = "broken"  # key on the group's store: why a rank has given the group up
_TELL_S = 0.3  # what telling the others may take, of the second in which an abort must be over


class StreamWork(Work, Protocol):
    """An operation that a GPU has under way."""

    def is_done(self) -> bool:
        """Whether the GPU is through with it. Never blocks."""
        ...


class StreamOrderedCommunicator(Communicator):
    """A backend implements, beside the hooks of `Communicator`, `_check_health` and `_abort_here`.

    Operations captured into a CUDA graph run when the graph does. The ledger and the watchdog see them where the graph
    was made by `captured`, and not where it is a caller's own.
    """

    in_background = True

    def __init__(self, spec: GroupSpec, gpu: Gpu) -> None:
        super().__init__(spec)
        self._gpu = gpu
        self._store = spec.store
        self._flights = Flights(gpu, spec.ledger, spec.name)
        self._in_order = False  # whether the operation that is being started blocks its caller's stream
        self._capturing = False
        self._marked: Marked | None = None  # while transfers are captured with marks
        self._tick_s = min(0.5, spec.timeout_s / 8)
        self._unwatched = threading.Event()
        weakref.finalize(self, _let_go, self._unwatched, self._flights.under_way)

    def _watch(self) -> None:
        """Starts the watchdog; for the end of a backend's constructor. It holds nothing that is not used otherwise."""
        threading.Thread(
            target=_watch,
            args=(weakref.ref(self), self._flights.under_way, self._unwatched, self._tick_s),
            name=f"phalanx-watchdog-{self.rank}",
            daemon=True,
        ).start()

    # ---- hooks of a backend ----

    @abstractmethod
    def _check_health(self) -> None:
        """Raises RuntimeError for an error that came up behind the calls. Called by the watchdog's thread."""

    @abstractmethod
    def _abort_here(self) -> None:
        """Ends what is under way on this rank, within a second. May be called from any thread."""

    # ---- one operation ----

    def _run(
        self, call: Call, result: Result, async_op: bool, start: Callable[..., Work], *arguments: object
    ) -> Result | Handle[Result]:
        return super()._run(call, result, async_op, partial(self._launch, call, async_op, start), *arguments)

    def _launch(self, call: Call, async_op: bool, start: Callable[..., Work], *arguments: object) -> Work:
        self._in_order = not async_op
        self._capturing = self._gpu.is_capturing()
        if self._capturing and self._marked is None:
            return start(*arguments)
        flights = self._flights if self._marked is None else self._marked
        flight = flights.begin(call, self._in_order)
        with self._gpu.named(f"{call[0]} #{call[1]} {self.group} layer {flight.layer}"):
            work = cast(StreamWork, start(*arguments))
        flight.work = work
        return _Flying(flights, flight, work)

    def captured(self, graphs: Graphs, run: Callable[[], None]) -> Graph:
        """Collectives only. Raises CommError for a send or receive."""
        num_before, sent_before = self._board.num_started, dict(self._num_sent)
        plain = graphs.capture(run)
        if self._num_sent != sent_before:
            raise CommError(f"group {self.group!r}: sends and receives cannot be replayed, only collectives")
        self._board.num_started = num_before
        self._marked = marked = Marked(self._gpu, self.ledger)
        try:
            timed = graphs.capture(run)
        finally:
            self._marked = None
            num_after, self._board.num_started = self._board.num_started, num_before  # a number is given when it runs
        if not marked.flights:
            return plain
        return WatchedGraph(plain, timed, marked, num_before, num_after, self.ledger, self._replay)

    def _replay(self, graph: WatchedGraph, timed: bool) -> None:
        """One operation of the group, as the watchdog sees it."""
        self._check_usable("replay")
        flight = Replay(graph, self._board.num_started, timed, self.ledger, self._flights.mark())
        self._board.num_started += graph.num_calls
        self._flights.add(flight)
        with self._gpu.named(f"{flight.call[0]} #{flight.call[1]} {self.group}"):
            (graph.timed if timed else graph.plain).replay()
        flight.passed = self._flights.mark()

    def _record(self, call: Call, started_s: float, waited_s: float, ended_s: float) -> None:
        """Nothing: what the thread has measured is not what the GPU does. `Flights` writes the entry."""

    # ---- the watchdog's thread ----

    def _look(self, stalled: _Stall) -> None:
        """One look at what is under way; breaks the group where something is wrong."""
        pending = self._flights.unfinished()
        flight = next((each for each in pending if each.stalls()), None)
        stalled.see(flight)
        self._board.waiting = None if flight is None else flight.call
        self._board.num_arrived = None if flight is None or flight.call[2] is not None else flight.call[1]
        if not pending or self._stopped:
            return
        try:
            self._check_health()
        except RuntimeError as error:
            what = self._describe((flight or pending[0]).call)
            self._break(f"{what} failed: {error}", self._failure_of(what, error))
            return
        told = self._told_by_others() if stalled.num_looks > 1 or flight is None else None
        if told is not None:
            self._break(told, GroupBrokenError(f"group {self.group!r} on rank {self.rank}: {told}"))
        elif flight is not None and stalled.lasted_s > self.timeout_s:
            late = self._late(flight.call)
            self._break(str(late), late)

    def _told_by_others(self) -> str | None:
        if self._store is None:
            return None
        try:
            return self._store.get(_BROKEN).decode() if self._store.check([_BROKEN]) else None
        except RuntimeError:
            return None  # the store is gone: our own limit remains

    def _abort(self) -> None:
        """Here at once; the others read why on the store, at their watchdog's next look."""
        telling = threading.Thread(target=self._tell_others, daemon=True)
        telling.start()
        self._abort_here()
        telling.join(_TELL_S)

    def _tell_others(self) -> None:
        if self._store is None:
            return
        try:
            if not self._store.check([_BROKEN]):  # the first reason stands
                self._store.set(_BROKEN, f"rank {self.rank} has given the group up: {self._broken}")
        except RuntimeError:
            return  # the store is gone, and with it whoever would have read this

    # ---- the end ----

    def _settled(self) -> bool:
        """Waits, blocking, until the GPU is through with all operations, up to the limit."""
        deadline_s = time.monotonic() + self.timeout_s
        while not self._flights.all_done():
            if self._broken is not None or time.monotonic() > deadline_s:
                return False
            time.sleep(0.001)
        return True

    def _close(self) -> None:
        _let_go(self._unwatched, self._flights.under_way)
        told = self._told_by_others() if self._broken is None else None
        if told is not None:
            self._break(told)
        if self._broken is None and not self._settled():
            self._break(f"it was closed on rank {self.rank} while operations were under way")
        self._flights.close()


class HostWait:
    """Blocks the thread until the event is reached: for a barrier."""

    __slots__ = ("_done", "_why_broken")

    def __init__(self, done: Callable[[], bool], why_broken: Callable[[], str | None]) -> None:
        self._done = done
        self._why_broken = why_broken

    def is_done(self) -> bool:
        return self._done()

    def wait(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        pause_s = 20e-6
        while not self._done():
            why = self._why_broken()
            if why is not None:
                raise RuntimeError(why)
            if time.monotonic() > deadline_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.001)
        # An abort ends the transfer too: it must not look like success.
        why = self._why_broken()
        if why is not None:
            raise RuntimeError(why)
        return True


class _Flying:
    """A backend's work, with the marks that the ledger needs around its wait."""

    __slots__ = ("_flight", "_flights", "_work")

    def __init__(self, flights: Flights | Marked, flight: Flight, work: StreamWork) -> None:
        self._flights = flights
        self._flight = flight
        self._work = work

    def wait(self, timeout_s: float) -> bool:
        if self._flight.reached is None:
            self._flight.reached = self._flights.mark()
        if not self._work.wait(timeout_s):
            return False
        self._flight.passed = self._flights.mark()
        return True


class _Stall:
    """For how long the watchdog has seen the same operation keep the GPU waiting."""

    def __init__(self) -> None:
        self._flight: Flight | None = None
        self._since_s = 0.0
        self.num_looks = 0

    def see(self, flight: Flight | None) -> None:
        if flight is not self._flight or flight is None:
            self._flight, self._since_s, self.num_looks = flight, time.monotonic(), 0
        self.num_looks += 1

    @property
    def lasted_s(self) -> float:
        return time.monotonic() - self._since_s


def _let_go(closed: threading.Event, under_way: threading.Event) -> None:
    """Ends the watchdog, which may be asleep."""
    closed.set()
    under_way.set()


def _watch(
    owner: weakref.ref[StreamOrderedCommunicator],
    under_way: threading.Event,
    closed: threading.Event,
    tick_s: float,
) -> None:
    """The watchdog: asleep while nothing is under way, else one look a tick."""
    stalled = _Stall()
    bound = False
    while True:
        under_way.wait()
        if closed.wait(tick_s):
            return
        communicator = owner()
        if communicator is None:
            return
        if not bound:
            communicator._gpu.bind_thread()
            bound = True
        communicator._look(stalled)
        del communicator
