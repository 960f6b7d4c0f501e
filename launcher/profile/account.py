"""Where the time of steps went on a rank: operators beside the roofline, transfers, waits, and what is left."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from phalanx.engine.messages import OperatorEntry, StageStep
from phalanx.engine.trace_book import RankTrace
from phalanx.kernels.ceilings import Ceilings
from phalanx.launcher.bench_kernels.measure import KernelReading
from phalanx.launcher.sizes import format_bytes
from phalanx.launcher.trace import Arrival, Key, TracedRun, arrivals, key_of
from phalanx.parallel.layout import RankPlace

OPERATOR, TRANSFER, WAIT, TORCH = "operator", "transfer", "wait", "torch"


@dataclass(frozen=True, slots=True)
class Row:
    """Calls of one kind, of a step on average. kind: `operator`; `transfer`; `wait`, in a transfer, for ranks that came
    to it later; or `torch`, of PyTorch beside these. load: sizes. least_us: what its bytes and operations take at the
    ceilings; 0 where these are not counted.
    """

    kind: str
    name: str
    load: str
    calls: float
    taken_us: float
    num_bytes: float = 0.0
    num_flops: float = 0.0
    least_us: float = 0.0

    @property
    def roofline(self) -> float | None:
        """The share of it that is reached."""
        return self.least_us / self.taken_us if self.least_us and self.taken_us else None


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of one kind on a rank, on average. name: `decode` or `prefill`. num_tokens: of a step. num_steps: that were
    looked at. step_us: of these, from having the plan to the end, waits for other stages included. plain_us: the same
    of steps that nobody looked at, None where there were none. rows: the longest first; what they leave of the step is
    the interpreter's, PyTorch's and the bindings' between the operators.
    """

    place: RankPlace
    name: str
    num_tokens: int
    num_steps: int
    step_us: float
    plain_us: float | None
    rows: tuple[Row, ...]

    @property
    def rest_us(self) -> float:
        return self.step_us - sum(row.taken_us for row in self.rows)

    def sum_us(self, kind: str) -> float:
        return sum(row.taken_us for row in self.rows if row.kind == kind)

    def readings(self) -> list[KernelReading]:
        """Its operators, each as one call."""
        return [
            KernelReading(
                row.name,
                row.load,
                row.taken_us / row.calls,
                None,
                row.least_us / row.calls,
                row.num_bytes / row.calls,
                row.num_flops / row.calls,
            )
            for row in self.rows
            if row.kind == OPERATOR
        ]

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": str(self.place),
            "phase": self.name,
            "tokens_of_a_step": self.num_tokens,
            "steps": self.num_steps,
            "step_us": self.step_us,
            "unprofiled_step_us": self.plain_us,
            "rest_us": self.rest_us,
            "rows": [{**asdict(row), "share_of_roofline": row.roofline} for row in self.rows],
        }


class _Span(NamedTuple):
    """Something that a rank did within a step; times in µs, a row's key, and what it moved and calculated."""

    started_us: float
    ended_us: float
    kind: str
    name: str
    entry: OperatorEntry | None = None
    num_bytes: float = 0.0


def phases(
    profiled: TracedRun, plain: TracedRun, ceilings: Mapping[RankPlace, Ceilings], *, on_gpu: bool
) -> list[Phase]:
    """Of every rank, in order: decodes, then prompts. profiled, plain: what the same ranks did while they were looked
    at, and while not. on_gpu: operators were timed there, while the CPU went on.
    """
    plain_steps = {rank.place: rank.trace.steps for rank in plain.ranks}
    found = []
    for replica in profiled.replicas:
        arrived = arrivals(replica)
        for place, trace in replica:
            for name, steps in _kinds(trace.steps).items():
                others = _kinds(plain_steps.get(place, ())).get(name, ())
                kept, num_tokens = _middle(steps), steps[0].num_tokens
                alike = _middle([step for step in others if step.num_tokens == num_tokens])
                rows = _rows(trace, kept, arrived, ceilings[place], on_gpu=on_gpu)
                plain_us = _mean_us(alike) if alike else None
                found.append(Phase(place, name, num_tokens, len(steps), _mean_us(kept), plain_us, rows))
    return found


def _kinds(steps: Sequence[StageStep]) -> dict[str, list[StageStep]]:
    """Steps of decodes alone, and others; of each those of the most usual number of tokens."""
    kinds = {
        "decode": [step for step in steps if step.num_tokens == step.num_decodes],
        "prefill": [step for step in steps if step.num_tokens > step.num_decodes],
    }
    found = {}
    for name, mine in kinds.items():
        if mine:
            counts = Counter(step.num_tokens for step in mine)
            usual = max(counts, key=lambda num_tokens: (counts[num_tokens], num_tokens))
            found[name] = [step for step in mine if step.num_tokens == usual]
    return found


def _span_us(step: StageStep) -> float:
    return 1e6 * (step.ended_s - step.started_s + step.waited_s)


def _middle(steps: Sequence[StageStep]) -> list[StageStep]:
    """The half of them that took neither the shortest nor the longest: on a busy machine some are of other programs."""
    ordered = sorted(steps, key=_span_us)
    out = len(ordered) // 4
    return ordered[out : len(ordered) - out]


def _mean_us(steps: Sequence[StageStep]) -> float:
    return sum(map(_span_us, steps)) / len(steps)


def _rows(
    trace: RankTrace, steps: Sequence[StageStep], arrived: Mapping[Key, Arrival], ceilings: Ceilings, *, on_gpu: bool
) -> tuple[Row, ...]:
    by_step: defaultdict[int, list[_Span]] = defaultdict(list)
    for span, number in _spans(trace, arrived):
        by_step[number].append(span)
    taken: defaultdict[tuple[str, str], list[tuple[_Span, float]]] = defaultdict(list)
    for step in steps:
        spans = by_step[step.step]
        ended_us = 1e6 * step.ended_s
        times = (
            [span.ended_us - span.started_us for span in spans]
            if on_gpu
            else own_us(spans, ended_us - _span_us(step), ended_us)
        )
        for span, took_us in zip(spans, times, strict=True):
            taken[span.kind, span.name].append((span, took_us))
        for name, took_us in _torch(trace, step.step):
            taken[TORCH, name].append((_Span(0.0, 0.0, TORCH, name), took_us))
    rows = [_row(kind, name, mine, len(steps), ceilings) for (kind, name), mine in taken.items()]
    return tuple(sorted(rows, key=lambda row: row.taken_us, reverse=True))


def _row(kind: str, name: str, mine: Sequence[tuple[_Span, float]], num_steps: int, ceilings: Ceilings) -> Row:
    entries = [span.entry for span, _ in mine if span.entry is not None]
    num_bytes = sum(span.num_bytes for span, _ in mine) / num_steps
    num_flops = sum(entry.num_flops for entry in entries) / num_steps
    least_us = sum(ceilings.least_us(entry.num_bytes, entry.num_flops) for entry in entries) / num_steps
    load = (
        _load([entry.sizes for entry in entries])
        if entries
        else format_bytes(round(mine[0][0].num_bytes))
        if num_bytes
        else ""
    )
    taken_us = sum(took_us for _, took_us in mine) / num_steps
    return Row(kind, name, load, len(mine) / num_steps, taken_us, num_bytes, num_flops, least_us)


def _load(sizes: Sequence[tuple[int, ...]]) -> str:
    """Of all calls: where one of their sizes differs, the smallest and the largest."""
    ends = [(min(each), max(each)) for each in zip(*sizes, strict=False)]
    return " x ".join(f"{least}" if least == most else f"{least}-{most}" for least, most in ends)


def _spans(trace: RankTrace, arrived: Mapping[Key, Arrival]) -> Iterator[tuple[_Span, int]]:
    """Each with its step."""
    for entry in trace.operators:
        weight = re.sub(r"^layers\.\d+\.", "", entry.weight)
        name = f"{entry.operator} {weight}".strip()
        started_us = 1e6 * entry.started_s
        yield _Span(started_us, started_us + 1e6 * entry.taken_s, OPERATOR, name, entry, entry.num_bytes), entry.step
    for transfer in trace.transfers:
        ended_us = transfer.started_us + transfer.total_us
        began_us = ended_us - transfer.waited_us
        key = key_of(transfer, trace.rank, trace.groups)
        came = arrived.get(key) if key is not None else None
        moving_us = began_us
        if came is not None and came.last is not None and came.last != trace.rank:
            moving_us = min(max(began_us, came.began_us), ended_us)
        if moving_us > began_us:
            yield _Span(began_us, moving_us, WAIT, transfer.op), transfer.step
        yield _Span(moving_us, ended_us, TRANSFER, transfer.op, num_bytes=transfer.num_bytes), transfer.step


def own_us(spans: Sequence[_Span], began_us: float, ended_us: float) -> list[float]:
    """What each took without those within it, and within the step: so they never add up to more than the step."""
    times = [0.0] * len(spans)
    open_: list[tuple[int, float]] = []  # and when each ends
    order = sorted(range(len(spans)), key=lambda index: (spans[index].started_us, -spans[index].ended_us))
    for index in order:
        start = max(spans[index].started_us, began_us)
        while open_ and open_[-1][1] <= start:
            open_.pop()
        end = min(spans[index].ended_us, open_[-1][1] if open_ else ended_us)
        times[index] = max(0.0, end - start)
        if open_:
            times[open_[-1][0]] -= times[index]
        open_.append((index, max(end, start)))
    return times


def _torch(trace: RankTrace, step: int) -> Iterator[tuple[str, float]]:
    """PyTorch's operators that are no part of others, and their times."""
    for entry in trace.torch:
        if entry.step == step and entry.own_s and entry.name.startswith("aten::"):
            yield entry.name, 1e6 * entry.own_s
