"""What physics allows: memory and cores inside a machine, the link between machines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from phalanx.comm.machine import Seat, machines_of, sharing_machines, why_apart
from phalanx.launcher.bench_comm.groups import CommGroup, Op, border_machines, crossing_share, touched_share
from phalanx.launcher.bench_comm.rank import Reading
from phalanx.launcher.bench_comm.ranks import Ranks

NUM_READINGS = 5  # of each; a limit is the best of them
PASSES = 20_000
STREAM_S = 0.3
LEAST_COPY_BYTES, MOST_COPY_BYTES = 64 << 20, 512 << 20


class Word(NamedTuple):
    """A word between two cores. seen_s: from the write until the other process sees it. interpreter_s: of that, what
    Python takes for the same loop within one process; what is left is the way between the cores.
    """

    seen_s: float
    interpreter_s: float

    @property
    def way_s(self) -> float:
        return max(1e-9, self.seen_s - self.interpreter_s)


class Link(NamedTuple):
    """One plain TCP connection. between: numbers in the group. one_way_s: half the echo of one byte."""

    between: tuple[int, int]
    bytes_per_s: float
    one_way_s: float


class Limits(NamedTuple):
    """machines: of each rank of the group. word: None where no two ranks share a machine of several cores, or where
    they compute on GPUs. copy_one, copy_all: bytes read and written a second by a copy beyond the caches, by one rank
    alone and by all together; on GPUs of their memory. links: between machines that follow each other in the group; on
    one machine, over loopback, what backends that use sockets there have at most.
    """

    machines: tuple[int, ...]
    word: Word | None
    copy_one_bytes_per_s: float
    copy_all_bytes_per_s: float
    links: tuple[Link, ...]

    @property
    def apart(self) -> bool:
        """Whether the ranks are on several machines."""
        return len(set(self.machines)) > 1

    def least_s(self, op: Op, num_bytes: int, copy_s: float, overhead_s: float) -> float | None:
        """No call of `op` on tensors of `num_bytes` can take less; None where nothing was measured that says so.

        copy_s: of a copy of as many bytes by all ranks at once, of which overhead_s is that of a copy of next to
        nothing. What ranks copy while they wait for a word, or for the link, is not added to it.
        """
        if self.apart:
            slowest = min(self.links, key=lambda link: link.bytes_per_s)
            crossing_s = num_bytes * crossing_share(op, self.machines) / slowest.bytes_per_s
            return max(crossing_s, *(link.one_way_s for link in self.links))
        if self.word is None:
            return None
        size = len(self.machines)
        return max(self.word.way_s, touched_share(op, size) * (copy_s - overhead_s))


def machine_numbers(ranks: Ranks) -> list[int]:
    """Of each rank: the same for ranks that share a machine."""
    return list(machines_of([Seat(*look["seat"]) for look in ranks.looks]))


def whereabouts(ranks: Ranks, group: CommGroup) -> dict[str, Any]:
    """Where the ranks of a group are, as `choose_backend` wants to know it."""
    seats = [Seat(*ranks.looks[rank]["seat"]) for rank in group.ranks]
    return {"apart": why_apart(seats), "machines": sharing_machines(seats)}


def measure_limits(ranks: Ranks, group: CommGroup, key: str, itemsize: int, device: str) -> Limits:
    """key: of a communicator of the group, by which its ranks begin together."""
    numbers = machine_numbers(ranks)
    machines = tuple(numbers[rank] for rank in group.ranks)
    cache_bytes: int = max(ranks.looks[rank]["cache_bytes"] for rank in group.ranks)
    copy_bytes = min(MOST_COPY_BYTES, max(LEAST_COPY_BYTES, 2 * cache_bytes))

    def copied(active: Sequence[int]) -> float:
        """Bytes a second, read and written, by `active` together."""
        taken = [
            together_s(ranks.read(group.ranks, key, "copy", copy_bytes // itemsize, 2, active), machines, 2)
            for _ in range(NUM_READINGS)
        ]
        return 2 * copy_bytes * len(active) / min(taken)

    pairs = list(border_machines(group, machines)) or [group.pair]
    return Limits(
        machines,
        _word(ranks, group, machines) if device == "cpu" else None,
        copied([group.pair[0]]),
        copied(range(len(group.ranks))),
        tuple(_link(ranks, group, pair) for pair in pairs),
    )


def together_s(readings: Sequence[Reading], machines: Sequence[int], calls: int) -> float:
    """Seconds a call from when the first rank of a machine began until its last was done, on the slowest machine.

    Ranks that are more than the cores take turns: the time of each by itself would say that all were faster.
    """
    spans = []
    for machine in set(machines):
        mine = [reading for reading, of in zip(readings, machines, strict=True) if of == machine]
        spans.append(max(each.ended_s for each in mine) - min(each.began_s for each in mine))
    return max(spans) / calls


def _word(ranks: Ranks, group: CommGroup, machines: Sequence[int]) -> Word | None:
    first, second = (group.ranks[number] for number in group.pair)
    look = ranks.looks[first]
    together = machines[group.pair[0]] == machines[group.pair[1]]
    if not together or look["num_cores"] < 2 or not hasattr(os, "memfd_create"):
        return None
    taken = []
    for _ in range(NUM_READINGS):
        sides = ranks.ask((first, second), "pass_word", passes=PASSES, cores=(0, 1))
        taken.append(Word(max(side["word"] for side in sides), min(side["interpreter"] for side in sides)))
    return min(taken, key=lambda word: word.seen_s)


def _link(ranks: Ranks, group: CommGroup, pair: tuple[int, int]) -> Link:
    sides = ranks.ask([group.ranks[number] for number in pair], "stream", seconds=STREAM_S)
    return Link(pair, sides[1]["bytes_per_s"], sides[0]["one_way_s"])
