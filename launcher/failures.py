"""Which of several failures came first: what to tell a user when one rank takes the others with it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.engine.messages import RankFailed
from phalanx.errors import RankFailedError
from phalanx.launcher.hosts import RankExit
from phalanx.parallel.layout import RankPlace


@dataclass(frozen=True, slots=True)
class Failure:
    """A rank's failure as it became known. seen_s: when, on the monotonic clock. told: by the rank itself."""

    rank: int
    node: str
    killed: bool
    message: str
    traceback: str
    symptom: bool
    seen_s: float
    told: bool


class FailureLog:
    """Gathers the failures of one replica, one a rank."""

    def __init__(self, places: Sequence[RankPlace]) -> None:
        self._places = places
        self._failures: dict[int, Failure] = {}

    def __bool__(self) -> bool:
        return bool(self._failures)

    @property
    def is_complete(self) -> bool:
        """Whether no rank is left that could add anything."""
        return len(self._failures) == len(self._places)

    @property
    def has_cause(self) -> bool:
        """Whether one of them is more than a symptom of another."""
        return any(not failure.symptom for failure in self._failures.values())

    def add_exit(self, ended: RankExit) -> None:
        """Adds the end of a rank that was not asked to end. Its own account, where it gave one, counts for more."""
        if ended.rank not in self._failures:
            message = "ended without being asked to" if ended.kind == "ended" else ended.message
            self._failures[ended.rank] = Failure(
                ended.rank,
                ended.node,
                ended.kind == "killed",
                message,
                ended.traceback,
                ended.symptom,
                time.monotonic(),
                False,
            )

    def add_message(self, failed: RankFailed, node: str) -> None:
        """Adds a rank's own account."""
        known = self._failures.get(failed.rank)
        if known is not None and known.told:
            return
        seen_s = known.seen_s if known is not None else time.monotonic()
        self._failures[failed.rank] = Failure(
            failed.rank, node, False, failed.message, failed.traceback, failed.symptom, seen_s, True
        )

    def error(self) -> RankFailedError:
        """The first cause: the killed before exceptions, before what others suffered for it; then the earliest."""
        first, *others = sorted(
            self._failures.values(),
            key=lambda failure: (failure.symptom, not failure.killed, failure.seen_s, failure.rank),
        )
        message = f"{self._describe(first)}"
        if first.traceback.strip():
            message += f"\n\nfrom that rank:\n{first.traceback.strip()}"
        return RankFailedError(message, rank=first.rank, symptoms=[self._describe(other) for other in others])

    def _describe(self, failure: Failure) -> str:
        return f"{self._places[failure.rank]} on node {failure.node} failed: {failure.message}"
