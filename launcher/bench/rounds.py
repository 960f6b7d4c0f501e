"""Runs a workload on an engine, round after round, and reads what its callers see."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

from phalanx.engine.comm_book import RankTotals, Waits, between, waits_between
from phalanx.engine.messages import StageStep
from phalanx.engine.request import Delta
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.stats import EngineStats
from phalanx.launcher.async_engine import AsyncEngine
from phalanx.launcher.bench.readings import RequestReading, Round
from phalanx.launcher.bench.workloads import RequestShape
from phalanx.launcher.comm_view import CommUse

REPORTS_S = 120.0  # for what stages report late: an idle engine looks twice a second
POLL_S = 0.02


class _Reading(NamedTuple):
    """Of each replica, at a moment when nothing runs: since the start."""

    stats: list[EngineStats]
    totals: list[RankTotals]
    waits: list[Waits]


async def measure(
    engine: AsyncEngine, requests: Sequence[RequestShape], num_rounds: int, on_round: Callable[[int], None]
) -> list[Round]:
    """Runs the requests so many times, after a round to warm up, number 0, in which they come all at once.

    Rounds do the same work on other prompts: those of round N are turned by N tokens. So no round finds a prefix of an
    earlier one in the cache, and the cache can stay as it is configured. on_round: hears a round's number before it
    begins.
    """
    on_round(0)
    await play(engine, [shape._replace(arrival_s=0.0) for shape in requests])
    rounds = []
    for number in range(1, num_rounds + 1):
        on_round(number)
        rounds.append(await play_round(engine, requests, number, trace=number == num_rounds))
    return rounds


async def play_round(
    engine: AsyncEngine, requests: Sequence[RequestShape], number: int, *, trace: bool = False
) -> Round:
    """Round `number` of the requests, by itself: what its callers saw, its stages did and its transfers took."""
    before = await _read(engine)
    readings = await play(engine, [turned(shape, number) for shape in requests])
    after = await _read(engine)
    async with asyncio.timeout(REPORTS_S):
        steps = await _all_steps(engine)
    found = _round(engine, readings, before, after, steps)
    return replace(found, trace=engine.traced(_numbers(before, after))) if trace else found


def turned(shape: RequestShape, number: int) -> RequestShape:
    """The same request with its prompt turned by so many tokens."""
    start = number % len(shape.prompt)
    return shape._replace(prompt=shape.prompt[start:] + shape.prompt[:start])


async def play(engine: AsyncEngine, requests: Sequence[RequestShape]) -> list[RequestReading]:
    """Sends each request when it is due, those that are due together in one call, and follows all to their end.

    Every request gets all tokens it asks for. Nobody waits for anybody: a request that is due is sent, whatever has
    become of those before it. Returns readings in the order of the requests.
    """
    began_s = time.perf_counter()

    async def follow(together: list[RequestShape]) -> list[RequestReading]:
        arrival_s = together[0].arrival_s
        await asyncio.sleep(began_s + arrival_s - time.perf_counter())
        token_s: list[list[float]] = [[] for _ in together]
        params = [SamplingParams(max_tokens=shape.max_tokens, ignore_eos=True) for shape in together]
        async for event in engine.stream([shape.prompt for shape in together], params):
            if isinstance(event, Delta):
                token_s[event.request] += [time.perf_counter() - began_s] * len(event.token_ids)
        return [
            RequestReading(len(shape.prompt), arrival_s, tuple(times))
            for shape, times in zip(together, token_s, strict=True)
        ]

    calls = [list(together) for _, together in groupby(requests, lambda shape: shape.arrival_s)]
    return [reading for readings in await asyncio.gather(*map(follow, calls)) for reading in readings]


async def _all_steps(engine: AsyncEngine) -> list[list[list[StageStep]]]:
    """By replica and stage, every step planned so far; waits until the stages have reported the last one."""
    while True:
        stages = engine.stage_steps()
        last = [stats.steps - 1 for stats in engine.replica_stats()]
        seen = [min(steps[-1].step if steps else -1 for steps in replica) for replica in stages]
        if all(number >= awaited for number, awaited in zip(seen, last, strict=True)):
            return stages
        await asyncio.sleep(POLL_S)


async def _read(engine: AsyncEngine) -> _Reading:
    """Waits until all ranks have told what they did so far."""
    async with asyncio.timeout(REPORTS_S):
        while not engine.all_is_told():
            await asyncio.sleep(POLL_S)
    return _Reading(engine.replica_stats(), engine.comm_totals(), engine.comm_waits())


def _numbers(before: _Reading, after: _Reading) -> list[range]:
    """The steps of each replica between two readings."""
    return [range(start.steps, end.steps) for start, end in zip(before.stats, after.stats, strict=True)]


def _round(
    engine: AsyncEngine,
    readings: Sequence[RequestReading],
    before: _Reading,
    after: _Reading,
    stages: Sequence[Sequence[Sequence[StageStep]]],
) -> Round:
    """stages: all steps of all rounds."""
    numbers = _numbers(before, after)
    start, end = EngineStats.together(before.stats), EngineStats.together(after.stats)
    overlaps = engine.comm_overlaps()
    uses = [
        CommUse.of(
            between(before.totals[replica], after.totals[replica]),
            len(mine),
            waits_between(before.waits[replica], after.waits[replica]),
            engine.link_rates(replica),
            overlaps[replica],
        )
        for replica, mine in enumerate(numbers)
    ]
    return Round(
        requests=tuple(readings),
        stages=tuple(
            tuple(tuple(step for step in steps if step.step in mine) for steps in replica)
            for mine, replica in zip(numbers, stages, strict=True)
        ),
        cached_tokens=end.prompt_tokens_cached - start.prompt_tokens_cached,
        preemptions=end.preemptions - start.preemptions,
        steps=end.steps - start.steps,
        comm=tuple(use for use in uses if use.ops),
    )
