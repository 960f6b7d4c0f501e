"""The transfers of a recording that the native library makes by itself: their numbers, their ledger, their errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from phalanx.comm.board import Call, WaitBoard
from phalanx.comm.ledger import Ledger

if TYPE_CHECKING:
    from phalanx._native import Transfers

Failure = tuple[int, int, int, int]


class _Recorded(NamedTuple):
    op: str
    num_bytes: int
    layer: int


class ReplayedTransfers:
    """Those of one group in one recording. To be told before and after each replay.

    native: what the library keeps of them. prepare: makes the group ready for the first, or raises. explain: raises
    what a transfer that failed raises outside of a recording.
    """

    def __init__(
        self,
        native: Transfers,
        board: WaitBoard,
        ledger: Ledger,
        group: str,
        prepare: Callable[[Call], None],
        explain: Callable[[Call, Failure], NoReturn],
    ) -> None:
        self.native = native
        self._board = board
        self._ledger = ledger
        self._group = group
        self._prepare = prepare
        self._explain = explain
        self._recorded: list[_Recorded] = []
        self._num_before = 0

    def add(self, op: str, num_bytes: int) -> None:
        """A transfer of the layer that the ledger is at."""
        self._recorded.append(_Recorded(op, num_bytes, self._ledger.layer))

    def before(self) -> None:
        self._num_before = self._board.num_started
        self._prepare(self._call(0))
        self.native.begin()
        self._board.replayed = self._now

    def after(self) -> None:
        """Writes down what the replay moved; raises what ended it early, if anything has."""
        num_ended, failed = divmod(self.native.position, 2)
        board, ledger = self._board, self._ledger
        board.num_started = self._num_before + num_ended + failed
        board.replayed = None
        times = self.native.times(num_ended)
        for seq, (started_s, ended_s, last) in enumerate(times, start=self._num_before + 1):
            op, num_bytes, layer = self._recorded[seq - self._num_before - 1]
            place = ledger.step, layer
            waited_s = ended_s - started_s
            ledger.record(seq, self._group, op, num_bytes, started_s, waited_s, ended_s, -1, last, place)
        if failed:
            ledger.layer = self._recorded[num_ended].layer
            self._explain(self._call(num_ended), self.native.outcome(num_ended))

    def _call(self, index: int) -> Call:
        op, num_bytes, _ = self._recorded[index]
        return op, self._num_before + index + 1, None, num_bytes

    def _now(self) -> tuple[int, Call | None, int]:
        """As `WaitBoard.now`, for the thread of the board."""
        num_ended, within = divmod(self.native.position, 2)
        layer = self._recorded[min(num_ended, len(self._recorded) - 1)].layer
        return self._num_before + num_ended + within, self._call(num_ended) if within else None, layer
