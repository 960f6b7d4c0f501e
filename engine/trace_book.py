"""What every rank did, step by step and transfer by transfer, on the engine's clock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Container, Mapping
from dataclasses import dataclass

from phalanx.comm.ledger import LedgerEntry
from phalanx.engine.clock import ClockReading
from phalanx.engine.messages import OperatorEntry, StageStep, TorchEntry, TraceReport


@dataclass(frozen=True, slots=True)
class RankTrace:
    """One rank of a replica. steps, transfers: oldest first, on the engine's clock, as far as the rank's is known.
    groups: the ranks of each of its groups, by their numbers in the replica. clock: the worst of its readings.
    num_lost: transfers that the rank could not hold until it was to tell of them. operators, torch: what was seen in
    steps that were profiled.
    """

    rank: int
    steps: tuple[StageStep, ...]
    transfers: tuple[LedgerEntry, ...]
    groups: Mapping[str, tuple[int, ...]]
    clock: ClockReading
    num_lost: int
    operators: tuple[OperatorEntry, ...] = ()
    torch: tuple[TorchEntry, ...] = ()


class TraceBook:
    """The last reports of every rank that traces. May be read from any thread."""

    def __init__(self, capacity: int = 1 << 17) -> None:
        """capacity: transfers and operators of a rank; the newest are kept."""
        self._capacity = capacity
        self._reports: dict[int, deque[TraceReport]] = {}
        self._num_held: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, report: TraceReport) -> None:
        with self._lock:
            reports = self._reports.setdefault(report.rank, deque())
            reports.append(report)
            held = self._num_held.get(report.rank, 0) + _size(report)
            while held > self._capacity and len(reports) > 1:
                held -= _size(reports.popleft())
            self._num_held[report.rank] = held

    @property
    def last_steps(self) -> dict[int, int]:
        """By rank: the latest step that it has told of."""
        with self._lock:
            return {rank: reports[-1].steps[-1].step for rank, reports in self._reports.items()}

    def traces(self, steps: Container[int]) -> dict[int, RankTrace]:
        """By rank: what is held of these steps."""
        with self._lock:
            reports = {rank: tuple(mine) for rank, mine in self._reports.items()}
        return {rank: _trace(rank, mine, steps) for rank, mine in reports.items()}


def _size(report: TraceReport) -> int:
    return len(report.transfers) + len(report.steps) + len(report.operators) + len(report.torch)


def _trace(rank: int, reports: tuple[TraceReport, ...], wanted: Container[int]) -> RankTrace:
    steps: list[StageStep] = []
    transfers: list[LedgerEntry] = []
    operators: list[OperatorEntry] = []
    torch: list[TorchEntry] = []
    for report in reports:
        offset_s = report.clock.offset_s
        steps += [step.shifted(offset_s) for step in report.steps if step.step in wanted]
        transfers += [
            each._replace(started_us=each.started_us + offset_s * 1e6)
            for each in report.transfers
            if each.step in wanted
        ]
        operators += [
            each._replace(started_s=each.started_s + offset_s) for each in report.operators if each.step in wanted
        ]
        torch += [each._replace(started_s=each.started_s + offset_s) for each in report.torch if each.step in wanted]
    return RankTrace(
        rank,
        tuple(steps),
        tuple(transfers),
        reports[-1].groups,
        max((report.clock for report in reports), key=lambda clock: clock.error_s),
        sum(report.num_lost for report in reports),
        tuple(operators),
        tuple(torch),
    )
