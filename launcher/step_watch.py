"""Steps that never end: what the ranks themselves cannot notice, such as a rank that no longer hears the engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from phalanx.errors import RankFailedError
from phalanx.parallel.layout import Layout, RankPlace

SLACK_S = 5.0  # for the ranks' own errors, which say more, to come first


class Overdue(NamedTuple):
    """A step without a result. stages: that have told nothing of it, in order."""

    step: int
    waited_s: float
    stages: tuple[int, ...]


class StepWatch:
    """Knows which steps are under way, and since when nothing has come of them."""

    def __init__(self, num_stages: int, timeout_s: float, clock_s: Callable[[], float] = time.monotonic) -> None:
        """timeout_s: that an operation of a rank may wait for another. So long each of several stages may take for a
        step, since the next one waits for it; nobody waits for one alone, and it may take however long it needs.
        """
        self.limit_s = num_stages * timeout_s + SLACK_S if num_stages > 1 else math.inf
        self._clock_s = clock_s
        self._since_s = 0.0
        self._planned = self._done = -1
        self._told = [-1] * num_stages

    def planned(self, step: int) -> None:
        if self._done == self._planned:
            self._since_s = self._clock_s()
        self._planned = step

    def done(self, step: int) -> None:
        self._done = step
        self._since_s = self._clock_s()

    def told(self, stage: int, step: int) -> None:
        """A stage has said that it did its part of a step."""
        self._told[stage] = step

    def overdue(self) -> Overdue | None:
        """The oldest step under way, where nothing has come for longer than the limit."""
        waited_s = self._clock_s() - self._since_s
        if self._done == self._planned or waited_s <= self.limit_s:
            return None
        step = self._done + 1
        return Overdue(step, waited_s, tuple(stage for stage, told in enumerate(self._told) if told < step))


def stuck_error(
    overdue: Overdue, layout: Layout, places: Sequence[RankPlace], nodes: Mapping[int, str]
) -> RankFailedError:
    """Names the ranks that nothing is heard of. nodes: by rank."""
    behind = overdue.stages or (len(layout.stages) - 1,)  # all did their parts, but the last one's answer does not come
    ranks = [rank for stage in behind for rank in layout.stage_ranks(stage)]
    names = ", ".join(f"{places[rank]} on node {nodes.get(rank, 'unknown')}" for rank in ranks)
    return RankFailedError(
        f"step {overdue.step} has had no result for {overdue.waited_s:.1f} s, and nothing is heard of it from {names}: "
        "the link between there and the engine, or to the stage before, is most likely cut, or a rank is stuck; where "
        "it is only slow, raise comm.timeout_s",
        rank=ranks[0],
    )
