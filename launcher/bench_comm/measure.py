"""Takes the readings: backends and a plain copy take turns, size by size, in one run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from phalanx.comm.create import Choice
from phalanx.errors import CommError
from phalanx.launcher.bench_comm.groups import CommGroup, Op, num_elements
from phalanx.launcher.bench_comm.limits import Limits, measure_limits, together_s, whereabouts
from phalanx.launcher.bench_comm.ranks import Ranks

READING_S = 0.02  # what the calls of a reading should take together
MOST_CALLS = 1000
COPY = "copy"


@dataclass(frozen=True, slots=True)
class CommOptions:
    """sizes: bytes of the longer tensor. num_rounds: readings of each, after those to warm up."""

    ops: tuple[Op, ...]
    sizes: tuple[int, ...]
    num_rounds: int


@dataclass(frozen=True, slots=True)
class SizeResult:
    """One operation at one size. readings_s: by backend, a reading a round: the mean time of its calls, on the slowest
    rank. limit_s: what no backend can go below; None where nothing was measured that says so.
    """

    op: Op
    num_bytes: int
    readings_s: dict[str, tuple[float, ...]]
    limit_s: float | None

    def median_s(self, backend: str) -> float:
        return statistics.median(self.readings_s[backend])


@dataclass(frozen=True, slots=True)
class GroupResult:
    """backends: that were measured, the one that a run takes marked by `chosen`. refused: problems by backend that
    ought to serve and did not.
    """

    group: CommGroup
    backends: tuple[Choice, ...]
    chosen: str
    refused: dict[str, str]
    limits: Limits
    sizes: tuple[SizeResult, ...] = ()


class Listener:
    """Hears how far it is; what it does not care for it leaves as it is."""

    def on_progress(self, words: str) -> None: ...

    def on_group(self, found: GroupResult) -> None:
        """Its limits are known, its sizes not yet."""

    def on_op(self, found: GroupResult, sizes: Sequence[SizeResult]) -> None:
        """All sizes of one operation."""


class Measurement:
    """Measures groups one after another; the ranks of the others sleep meanwhile."""

    def __init__(
        self, ranks: Ranks, options: CommOptions, *, backend: str, device: str, itemsize: int, listener: Listener
    ) -> None:
        """backend: as configured, a name or `auto`. itemsize: bytes of an element."""
        self._ranks = ranks
        self._options = options
        self._backend = backend
        self._device = device
        self._itemsize = itemsize
        self._listener = listener
        self._joined: dict[tuple[str, tuple[int, ...]], str] = {}

    def measure(self, group: CommGroup) -> GroupResult:
        """All operations and sizes of a group, on every backend that serves it."""
        self._listener.on_progress(f"{group.name}: joining, and what the machine can do")
        found = self._open(group)
        self._listener.on_group(found)
        sizes: list[SizeResult] = []
        for op in group.ops:
            done = [self._measure_size(found, op, size) for size in (self._options.sizes if op != "barrier" else (0,))]
            self._listener.on_op(found, done)
            sizes += done
        return GroupResult(group, found.backends, found.chosen, found.refused, found.limits, tuple(sizes))

    def _open(self, group: CommGroup) -> GroupResult:
        """Joins the group with each backend."""
        (answer,) = self._ranks.ask(
            group.ranks[:1],
            "backends",
            size=len(group.ranks),
            named=self._backend,
            **whereabouts(self._ranks, group),
        )
        chosen = answer["chosen"]
        joined: list[Choice] = []
        refused: dict[str, str] = {}
        for name, reason in sorted(answer["usable"], key=lambda each: each[0] != chosen):
            problem = self._join(group, name)
            if problem:
                refused[name] = problem
            else:
                joined.append(Choice(name, reason))
        if not joined:
            problems = "; ".join(f"{name}: {problem}" for name, problem in refused.items())
            raise CommError(f"no backend connects the ranks of {group.name}: {problems}")
        limits = measure_limits(self._ranks, group, _key(group, joined[0].name), self._itemsize, self._device)
        return GroupResult(group, tuple(joined), chosen, refused, limits)

    def _join(self, group: CommGroup, backend: str) -> str:
        """Borders of the pipeline share a communicator. Returns why it does not serve, or nothing."""
        key = _key(group, backend)
        if (backend, group.ranks) not in self._joined:
            answers = self._ranks.ask(group.ranks, "join", key=key, backend=backend)
            self._joined[backend, group.ranks] = next((each["problem"] for each in answers if "problem" in each), "")
        return self._joined[backend, group.ranks]

    def _measure_size(self, found: GroupResult, op: Op, size: int) -> SizeResult:
        group = found.group
        elements = num_elements(op, size, self._itemsize, len(group.ranks))
        names = [backend.name for backend in found.backends]
        everyone = range(len(group.ranks))
        active = group.pair if op == "send_recv" else everyone

        def reader(way: str, num: int) -> Callable[[int], float]:
            copies = way.startswith(COPY)
            key = _key(group, names[0] if copies else way)
            who = list(everyone if copies else active)

            def read(calls: int) -> float:
                taken = self._ranks.read(group.ranks, key, COPY if copies else op, num, calls, who)
                if copies:
                    return together_s(taken, found.limits.machines, calls)
                return max(reading.call_s for reading in taken)

            return read

        ways = {name: reader(name, elements) for name in names}
        ways |= {COPY: reader(COPY, elements), f"{COPY} of nothing": reader(COPY, 1)}
        taken = self._alternate(f"{group.name}: {op} of {elements * self._itemsize:,} bytes", ways)
        num_bytes = elements * self._itemsize
        copy_s, overhead_s = (min(taken.pop(way)) for way in (COPY, f"{COPY} of nothing"))
        limit_s = found.limits.least_s(op, num_bytes, copy_s, overhead_s)
        return SizeResult(op, num_bytes, {name: tuple(values) for name, values in taken.items()}, limit_s)

    def _alternate(self, what: str, ways: dict[str, Callable[[int], float]]) -> dict[str, list[float]]:
        """The readings of each way. A first reading warms it up, and says how many calls the others have."""
        self._listener.on_progress(f"{what}: warm-up")
        calls = {name: num_calls(read(2)) for name, read in ways.items()}
        taken: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        for number in range(self._options.num_rounds):
            self._listener.on_progress(f"{what}: round {number + 1} of {self._options.num_rounds}")
            for name in order:
                taken[name].append(ways[name](calls[name]))
            order.append(order.pop(0))  # whoever is first has the others' data in its caches; so all are in turn
        return taken


def num_calls(call_s: float) -> int:
    """Calls of a reading, where one takes `call_s`."""
    return max(2, min(MOST_CALLS, round(READING_S / max(call_s, 1e-9))))


def _key(group: CommGroup, backend: str) -> str:
    return f"bench-{backend}-{'-'.join(map(str, group.ranks))}"
