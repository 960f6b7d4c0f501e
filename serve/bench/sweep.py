"""Measures a server at one rate after another, and finds the rate at which requests become too many."""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from phalanx.errors import PhalanxError
from phalanx.launcher.bench.readings import LatencyLimits
from phalanx.launcher.bench.workloads import RequestShape
from phalanx.serve.bench.client import HttpClient, RequestForm
from phalanx.serve.bench.lengths import RequestSource
from phalanx.serve.bench.points import ClientCost, HttpReading, Point, falls_behind, read_answer

GROWTH = 2.0  # of the rate, until it is too much
NUM_BISECTIONS = 2  # of the gap between the last rate that was not and the first that was: to a factor of 1.2
MOST_POINTS, LEAST_OF_START = 16, 1 / 16
NUM_WARMUP = 8
DRAIN_S = 60.0
SHOW_S = 0.5

_REMEDIES = {
    "HTTP 400": "where the server does not know ignore_eos, give --respect-eos; where it takes no token ids, --text; "
    "where requests are too long for it, --scale",
    "HTTP 401": "give a key with --api-key-file",
    "HTTP 404": "give the name of a model that it has with --model, or --chat if it has chats only",
    "HTTP 429": "it is busy with others; try again when it is not",
    "no connection": "is it running?",
    "disconnected": "look at its log",
    "time-out": "raise --timeout, or shorten all with --scale",
}
_REMEDIES["HTTP 422"] = _REMEDIES["HTTP 400"]
_REMEDIES["HTTP 403"] = _REMEDIES["HTTP 401"]


class Judged(NamedTuple):
    """A rate that was measured."""

    rate_per_s: float
    kept_up: bool


def next_rate(judged: Sequence[Judged], start: float) -> float | None:
    """The rate to measure next; None when the knee is found, or out of reach.

    Doubles from the first until one is too much; halves where the first is; then halves the gap, as logarithms go.
    """
    if not judged:
        return start
    if len(judged) >= MOST_POINTS:
        return None
    too_much = min((each.rate_per_s for each in judged if not each.kept_up), default=None)
    if too_much is None:
        return max(each.rate_per_s for each in judged) * GROWTH
    fine = max((each.rate_per_s for each in judged if each.kept_up and each.rate_per_s < too_much), default=None)
    if fine is None:
        return too_much / GROWTH if too_much > start * LEAST_OF_START else None
    between = rounded(math.sqrt(fine * too_much))
    width = GROWTH ** (0.5**NUM_BISECTIONS)
    return between if too_much / fine > width * 1.1 and fine < between < too_much else None


def rounded(rate: float) -> float:
    """To two digits."""
    return float(f"{rate:.2g}")


def knee(points: Sequence[Point], limits: LatencyLimits) -> Point | None:
    """The point of the highest rate that the server kept up with, below all that it did not; see points.KNEE."""
    best = None
    for point in sorted(points, key=lambda point: point.rate_per_s):
        if not point.interrupted:
            if falls_behind(point, limits):
                break
            best = point
    return best


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """rates: to measure, in order; found by doubling where there are none. At each rate as many requests as last for
    `duration_s`, and no fewer than `num_requests`.
    """

    form: RequestForm
    source: RequestSource
    limits: LatencyLimits
    rates: tuple[float, ...] = ()
    num_requests: int = 64
    duration_s: float = 20.0

    def num_at(self, rate_per_s: float) -> int:
        return max(self.num_requests, math.ceil(rate_per_s * self.duration_s), 1)


@dataclass(slots=True)
class Progress:
    """How far it is with one rate. rate_per_s: None during warm-up. client: once all is sent and answered."""

    rate_per_s: float | None
    num_planned: int
    num_sent: int = 0
    num_chunks: int = 0
    elapsed_s: float = 0.0
    readings: list[HttpReading] = field(default_factory=list)
    client: ClientCost | None = None


@dataclass(slots=True)
class Sweep:
    """points: measured so far, whatever ends the run."""

    client: HttpClient
    plan: SweepPlan
    on_progress: Callable[[Progress], None]
    on_point: Callable[[Point], None]
    points: list[Point] = field(default_factory=list)

    async def run(self) -> None:
        """Warms up, then measures. Raises PhalanxError where none of the requests at a rate is served."""
        start = rounded(1 / await self._warm_up())
        for rate in self.plan.rates or self._swept(start):
            await self._measure(rate)

    def _swept(self, start: float) -> Iterator[float]:
        """Rates one after another, each chosen when the one before has been measured."""
        while True:
            judged = [Judged(point.rate_per_s, not falls_behind(point, self.plan.limits)) for point in self.points]
            rate = next_rate(judged, start)
            if rate is None:
                return
            yield rate

    async def _warm_up(self) -> float:
        """Some requests at once, then one alone. Returns how many seconds the latter took."""
        shapes = [shape._replace(arrival_s=0.0) for shape in self.plan.source.draw(1.0, NUM_WARMUP + 1, 0)]
        shapes.sort(key=lambda shape: shape.max_tokens)
        typical = shapes.pop(len(shapes) // 2)
        crowd, alone = Progress(None, NUM_WARMUP), Progress(None, 1)
        await self._play(crowd, shapes)
        cost = await self._play(alone, [typical])
        self._check_served([*crowd.readings, *alone.readings])
        return cost.elapsed_s

    async def _measure(self, rate_per_s: float) -> None:
        shapes = self.plan.source.draw(rate_per_s, self.plan.num_at(rate_per_s), len(self.points) + 1)
        progress, drained = Progress(rate_per_s, len(shapes)), True
        try:
            await self._play(progress, shapes)
            drained = await self.client.drained(DRAIN_S)
        finally:  # what an interruption leaves is shown too
            if progress.readings and progress.client is not None:
                readings = tuple(sorted(progress.readings, key=lambda reading: reading.arrival_s))
                self.points.append(Point(rate_per_s, len(shapes), readings, progress.client, drained))
                self.on_point(self.points[-1])
        self._check_served(progress.readings)

    async def _play(self, progress: Progress, shapes: Sequence[RequestShape]) -> ClientCost:
        """Sends each request when it is due, whatever has become of those before it, and follows all to their end."""
        form, client = self.plan.form, self.client
        bodies = [form.body(shape) for shape in shapes]
        # A look through all that the imports have made takes 0.1 s, in which no token would be seen.
        gc.collect()
        gc.freeze()
        num_chunks, cpu_s, began_s = client.num_chunks, time.process_time(), time.perf_counter()

        async def follow(shape: RequestShape, body: bytes) -> None:
            sent_s = time.perf_counter()
            answer = await client.complete(form.path, body)
            progress.readings.append(read_answer(answer, shape, began_s=began_s, sent_s=sent_s))

        async def show() -> None:
            while True:
                progress.elapsed_s = time.perf_counter() - began_s
                progress.num_chunks = client.num_chunks - num_chunks
                self.on_progress(progress)
                await asyncio.sleep(SHOW_S)

        showing = asyncio.create_task(show())
        try:
            async with asyncio.TaskGroup() as group:
                for shape, body in zip(shapes, bodies, strict=True):
                    await asyncio.sleep(max(0.0, began_s + shape.arrival_s - time.perf_counter()))
                    group.create_task(follow(shape, body))
                    progress.num_sent += 1
        finally:
            gc.unfreeze()
            showing.cancel()
            progress.client = ClientCost(
                time.perf_counter() - began_s, time.process_time() - cpu_s, client.num_chunks - num_chunks
            )
        return progress.client

    def _check_served(self, readings: Sequence[HttpReading]) -> None:
        failures = [reading.failure for reading in readings if reading.failure is not None]
        if not readings or len(failures) < len(readings):
            return
        kinds = Counter(failure.kind for failure in failures)
        counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        first = next(failure for failure in failures if failure.kind == kinds.most_common(1)[0][0])
        remedy = _REMEDIES.get(first.kind, "look at the log of the server")
        raise PhalanxError(
            f"none of {len(readings)} requests to {self.client.root}/v1{self.plan.form.path} was served: {counts} "
            f"({first.message}); {remedy}"
        )
