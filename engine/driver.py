"""The thread that drives an engine."""

from __future__ import annotations

import logging
import queue
import threading
from typing import NamedTuple

from phalanx.engine.engine import Engine, Executor
from phalanx.engine.request import Delta, Event, Request
from phalanx.engine.stats import EngineStats
from phalanx.errors import PhalanxError

logger = logging.getLogger(__name__)

STEP_S = 5.0  # how long one wait for the ranks lasts; what they say, their failures and new requests end it at once
IDLE_S = 0.5  # between two looks at ranks that have nothing to do


class _Order(NamedTuple):
    """What a caller wants of the engine's thread. abort: to end the requests; else to take them in."""

    requests: tuple[Request, ...]
    abort: bool


class EngineDriver:
    """Runs the engine of one replica in a thread of its own, which sleeps while nothing is to be done.

    Where the ranks fail, every open request ends with that error, and so does every later one. All methods may be
    called from any thread.
    """

    def __init__(self, engine: Engine, executor: Executor) -> None:
        self._engine = engine
        self._executor = executor
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[int, Request] = {}  # by identity
        self._num_open = 0  # completions of these
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="phalanx-engine", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """For what may be asked of it from any thread."""
        return self._engine

    @property
    def failure(self) -> Exception | None:
        """What ended the engine."""
        return self._failure

    @property
    def load(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def submit(self, *requests: Request) -> None:
        """Hands in requests that `Engine.check` has passed, to be planned together; what becomes of them comes to their
        mailboxes. Raises QueueFullError where too many are waiting, and the error that the engine has ended with.
        """
        count = sum(request.params.n for request in requests)
        with self._lock:
            if self._failure is not None:
                raise self._failure.with_traceback(None)  # one error for many: each raises it from its own place
            self._engine.check_room(self._num_open, count)
            self._num_open += count
            self._open.update((id(request), request) for request in requests)
            self._orders.put(_Order(requests, abort=False))
        self._executor.wake()

    def abort(self, *requests: Request) -> None:
        """Ends requests within a step, as far as they have not ended."""
        with self._lock:
            if self._failure is not None:
                return  # they have ended with it
            self._orders.put(_Order(requests, abort=True))
        self._executor.wake()

    def close(self) -> None:
        """Ends the thread, and the open requests with an error."""
        self._orders.put(None)
        self._executor.wake()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._follow_orders():
                self._hand_out(self._engine.step(STEP_S if self._engine.has_work else 0.0))
            self._fail(PhalanxError("the engine was closed; make a new one"))
        except Exception as error:
            self._fail(error)

    def _follow_orders(self) -> bool:
        """Does what callers want; waits for it while there is nothing else to do. False at the end."""
        sleeping = not self._engine.has_work
        while True:
            try:
                order = self._orders.get(sleeping, IDLE_S)
            except queue.Empty:
                return True
            if order is None:
                return False
            sleeping = False
            for request in order.requests:
                try:
                    if order.abort:
                        self._hand_out(self._engine.abort(request))
                    else:
                        self._engine.add(request)
                except Exception as error:  # of a guide, which is the caller's code
                    self._hand_out([Event(request, error)])

    def _hand_out(self, events: list[Event]) -> None:
        by_mailbox: dict[int, list[Event]] = {}
        for event in events:
            by_mailbox.setdefault(id(event.request.mailbox), []).append(event)
            if not isinstance(event.what, Delta):
                with self._lock:
                    if self._open.pop(id(event.request), None) is not None:
                        self._num_open -= event.request.params.n
                event.request.tracks.clear()  # which name it in turn: nobody would free the two but the collector
        for mine in by_mailbox.values():
            try:
                mine[0].request.mailbox.put(mine)
            except Exception:  # the caller's code, which must not end the engine for the others
                logger.exception("a mailbox failed to take %d events", len(mine))

    def _fail(self, error: Exception) -> None:
        with self._lock:
            self._failure = error
            requests = list(self._open.values())
        self._hand_out([Event(request, error) for request in requests])
