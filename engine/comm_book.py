"""What the transfers of every rank took, summed up from what the ranks report."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from phalanx.comm.ledger import CommTotals
from phalanx.engine.messages import CommReport

RankTotals = Mapping[int, tuple[CommTotals, ...]]
"""By rank: one a layer, operation and group, in the order of layers; -1 is what belongs to none."""
Waits = Mapping[int, Mapping[int, float]]
"""By rank: microseconds that it waited for another, by that one's number, as far as it knows for whom."""


class CommBook:
    """Sums since the start. May be read from any thread."""

    def __init__(self) -> None:
        self._totals: dict[int, dict[tuple[int, str, str], CommTotals]] = {}
        self._waits: dict[int, dict[int, float]] = {}
        self._overlaps: dict[int, str] = {}
        self._last_steps: dict[int, int] = {}
        self._lock = threading.Lock()

    def add(self, report: CommReport) -> None:
        with self._lock:
            self._last_steps[report.rank] = report.last_step
            totals = self._totals.setdefault(report.rank, {})
            for each in report.totals:
                key = _key(each)
                totals[key] = _sum(totals.get(key), each)
            waits = self._waits.setdefault(report.rank, {})
            for late in report.late:
                waits[late.rank] = waits.get(late.rank, 0.0) + late.exposed_us
            if report.overlap:
                self._overlaps[report.rank] = report.overlap

    @property
    def last_step(self) -> int:
        """The latest step that all ranks which report have told of; -1 where none has."""
        with self._lock:
            return min(self._last_steps.values(), default=-1)

    def totals(self) -> RankTotals:
        with self._lock:
            return {rank: tuple(totals[key] for key in sorted(totals)) for rank, totals in sorted(self._totals.items())}

    def waits(self) -> Waits:
        with self._lock:
            return {rank: dict(waits) for rank, waits in sorted(self._waits.items())}

    def overlaps(self) -> Mapping[int, str]:
        """By the first rank of a stage: how its sums are hidden now, and why, where that is no longer by the rates
        measured at the start.
        """
        with self._lock:
            return dict(sorted(self._overlaps.items()))


def waits_between(before: Waits, after: Waits) -> Waits:
    """What came between two readings of a book."""
    return {
        rank: {other: waited_us - before.get(rank, {}).get(other, 0.0) for other, waited_us in waits.items()}
        for rank, waits in after.items()
    }


def between(before: RankTotals, after: RankTotals) -> RankTotals:
    """What came between two readings of a book."""
    found = {}
    for rank, totals in after.items():
        known = {_key(each): each for each in before.get(rank, ())}
        differences = (_sum(known.get(_key(each)), each, sign=-1) for each in totals)
        found[rank] = tuple(each for each in differences if each.num_ops)
    return found


def _key(totals: CommTotals) -> tuple[int, str, str]:
    return totals.layer, totals.op, totals.group


def _sum(one: CommTotals | None, other: CommTotals, sign: int = 1) -> CommTotals:
    """The other and `sign` times the one."""
    if one is None:
        return other
    return other._replace(
        num_ops=other.num_ops + sign * one.num_ops,
        num_bytes=other.num_bytes + sign * one.num_bytes,
        exposed_us=other.exposed_us + sign * one.exposed_us,
        hidden_us=other.hidden_us + sign * one.hidden_us,
    )
