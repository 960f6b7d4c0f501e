"""What a rank's clock is behind the engine's: asked over the wire, over and over, and answered with an error.

The exchange is NTP's (RFC 5905): the rank notes when it asks, the engine when it hears and when it answers, the rank
when it has the answer. Whatever of the round trip was the way there and whatever the way back, the true offset lies
within half the round trip of the one that takes both to be equal.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

DRIFT = 50e-6  # seconds a second that two quartz clocks may part, generously
KEPT = 32  # exchanges
BURST = 8  # exchanges in a row, of which one goes through undisturbed
ANSWER_S = 0.25  # longest wait for an answer; one that takes longer tells nothing worth knowing


class ClockReading(NamedTuple):
    """offset_s: to be added to the rank's clock for the engine's. error_s: by which that may be wrong."""

    offset_s: float = 0.0
    error_s: float = 0.0


class ClockExchange(NamedTuple):
    """Seconds; asked_s and had_s on the clock of the rank, heard_s and answered_s on that of the engine."""

    asked_s: float
    heard_s: float
    answered_s: float
    had_s: float

    @property
    def round_trip_s(self) -> float:
        return (self.had_s - self.asked_s) - (self.answered_s - self.heard_s)

    def reading(self, now_s: float) -> ClockReading:
        """What it says of the offset at `now_s` of the rank's clock: the older it is, the less."""
        offset_s = ((self.heard_s - self.asked_s) + (self.answered_s - self.had_s)) / 2
        return ClockReading(offset_s, self.round_trip_s / 2 + DRIFT * max(0.0, now_s - self.had_s))


class ClockFilter:
    """The last exchanges, and the best of them: the one with the shortest round trip, unless it is too old to tell."""

    def __init__(self) -> None:
        self._exchanges: deque[ClockExchange] = deque(maxlen=KEPT)

    def add(self, exchange: ClockExchange) -> None:
        self._exchanges.append(exchange)

    def reading(self, now_s: float) -> ClockReading:
        """The offset at `now_s` of the rank's clock; of no known error where no exchange has succeeded yet.

        Offsets that cannot be told from 0 are 0: clocks that count from the start of a machine agree so closely only
        where they are one.
        """
        readings = [exchange.reading(now_s) for exchange in list(self._exchanges)]
        best = min(readings, key=lambda reading: reading.error_s, default=ClockReading(0.0, float("inf")))
        return best._replace(offset_s=0.0) if abs(best.offset_s) <= best.error_s else best


class ClockKeeper:
    """Asks the engine for the time behind a rank's back, in a thread of its own: a rank reads its messages between two
    steps, by which time an answer says little.
    """

    def __init__(self, exchange: Callable[[float], ClockExchange | None]) -> None:
        """exchange: asks once and waits for the answer, so many seconds at most. Called from one thread at a time."""
        self._exchange = exchange
        self._filter = ClockFilter()
        self._wanted = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="phalanx-clock", daemon=True)
        self._burst()
        self._thread.start()

    def reading(self) -> ClockReading:
        return self._filter.reading(time.perf_counter())

    def refresh(self) -> None:
        """Asks again, without waiting for it."""
        self._wanted.release()

    def close(self) -> None:
        self._closed = True
        self._wanted.release()
        self._thread.join(2 * ANSWER_S)

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            if self._closed:
                return
            self._burst()

    def _burst(self) -> None:
        for _ in range(BURST):
            exchange = None if self._closed else self._exchange(ANSWER_S)
            if exchange is None:
                return
            self._filter.add(exchange)
