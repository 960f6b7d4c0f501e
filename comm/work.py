"""What a backend hands back for an operation it has started, and the errors of operations that do not end well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from phalanx.errors import CommError


class Work(Protocol):
    """An operation under way."""

    def wait(self, timeout_s: float) -> bool:
        """Blocks until the result may be used: True, or False where that takes longer than `timeout_s` seconds.

        Called once. On return of True the result is in its tensor, or, for a backend ordered by a device stream, will
        be before anything enqueued on that stream from now on. Raises ConnectionError where a peer is gone,
        RuntimeError for any other failure of the transfer.
        """
        ...


class TimedWork:
    """Work that knows, once it is done, how many seconds its transfer was under way."""

    __slots__ = ("took_s",)
    took_s: float


class FinishedWork:
    """Work with nothing left to do."""

    __slots__ = ()

    def wait(self, timeout_s: float) -> bool:
        return True


FINISHED = FinishedWork()


class WaitTimeoutError(CommError):
    """An operation that waited longer than its limit. `missing_ranks`: those in the group that had not arrived.
    `guilty_ranks`: those that were not seen waiting themselves, among the missing and those they wait for in turn.
    """

    def __init__(self, message: str, missing_ranks: Sequence[int], guilty_ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.guilty_ranks = tuple(guilty_ranks)
        self.missing_ranks = tuple(missing_ranks)


class GroupBrokenError(CommError):
    """An operation in a group that is no more: a symptom of something that failed elsewhere or earlier."""


class PeerLostError(GroupBrokenError):
    """A rank of the group closed its connection, most likely because it died. A symptom: its own error is the cause.

    `peer`: its number in the group, where the operation was with one rank only; else None.
    """

    def __init__(self, message: str, peer: int | None = None) -> None:
        super().__init__(message)
        self.peer = peer
