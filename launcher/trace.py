"""What all ranks of a run did, and which of their transfers belong together: what traces and pictures are made of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from phalanx.comm.ledger import LedgerEntry
from phalanx.engine.trace_book import RankTrace
from phalanx.parallel.layout import RankPlace


class TracedRank(NamedTuple):
    """A rank and what it did."""

    place: RankPlace
    trace: RankTrace


@dataclass(frozen=True, slots=True)
class TracedRun:
    """replicas: of each, its ranks in order."""

    replicas: tuple[tuple[TracedRank, ...], ...]

    @classmethod
    def together(cls, runs: Sequence[TracedRun]) -> TracedRun:
        """Of the same ranks, one run after the other."""
        replicas = zip(*(run.replicas for run in runs), strict=True)
        return cls(tuple(tuple(map(_joined, zip(*replica, strict=True))) for replica in replicas))

    @property
    def ranks(self) -> tuple[TracedRank, ...]:
        return tuple(rank for ranks in self.replicas for rank in ranks)


def _joined(parts: Sequence[TracedRank]) -> TracedRank:
    traces = [part.trace for part in parts]
    trace = RankTrace(
        traces[0].rank,
        tuple(step for each in traces for step in each.steps),
        tuple(entry for each in traces for entry in each.transfers),
        traces[0].groups,
        max((each.clock for each in traces), key=lambda clock: clock.error_s),
        max(each.num_lost for each in traces),
        tuple(entry for each in traces for entry in each.operators),
        tuple(entry for each in traces for entry in each.torch),
    )
    return TracedRank(parts[0].place, trace)


class Arrival(NamedTuple):
    """When the ranks of a transfer came to it. last: the rank that came last, None where the clocks are not good enough
    to say. began_us: when it did.
    """

    last: int | None
    began_us: float


Key = tuple[str, int, int, int]
"""Group, number, and for a send and its recv the two ends by their numbers in the group, else -1 twice."""


def key_of(entry: LedgerEntry, rank: int, groups: Mapping[str, tuple[int, ...]]) -> Key | None:
    """What the entries of one transfer have in common on all its ranks; None for one of a group that the rank does not
    know of, as one that a communicator made for itself. rank: whose entry it is.
    """
    if entry.group not in groups:
        return None
    if entry.peer < 0:
        return entry.group, entry.seq, -1, -1
    own = groups[entry.group].index(rank)
    ends = (own, entry.peer) if entry.op == "send" else (entry.peer, own)
    return entry.group, entry.seq, *ends


def arrivals(replica: Sequence[TracedRank]) -> dict[Key, Arrival]:
    """Of every transfer that all its ranks have told of.

    A backend that saw who came last is believed; else it is the one whose clock says so, by more than the clocks may
    be wrong.
    """
    found: defaultdict[Key, list[tuple[LedgerEntry, RankTrace]]] = defaultdict(list)
    for _, trace in replica:
        for entry in trace.transfers:
            if (key := key_of(entry, trace.rank, trace.groups)) is not None:
                found[key].append((entry, trace))
    return {key: _arrival(parts) for key, parts in found.items() if len(parts) == _num_ranks(key, parts[0][1])}


def _num_ranks(key: Key, trace: RankTrace) -> int:
    return 2 if key[2] >= 0 else len(trace.groups[key[0]])


def _arrival(parts: Sequence[tuple[LedgerEntry, RankTrace]]) -> Arrival:
    ordered = sorted(parts, key=lambda part: part[0].started_us)
    last, trace = ordered[-1]
    seen = [trace.groups[entry.group][entry.last] for entry, _ in parts if entry.last >= 0]
    if seen:
        named = max(seen, key=seen.count)
        return Arrival(named, next(entry.started_us for entry, of in parts if of.rank == named))
    if len(ordered) == 1:
        return Arrival(None, last.started_us)
    before, other = ordered[-2]
    error_us = (trace.clock.error_s + other.clock.error_s) * 1e6
    return Arrival(trace.rank if last.started_us - before.started_us > error_us else None, last.started_us)


def exposed_us(trace: RankTrace) -> Iterator[tuple[float, float]]:
    """(begin, length) of every wait, in microseconds. What a rank waited in starting a transfer is taken to be at the
    end, where it waited for it.
    """
    for entry in trace.transfers:
        yield entry.started_us + entry.total_us - entry.waited_us, entry.waited_us
