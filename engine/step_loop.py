"""A rank at work: plans come in, steps are run, and what they found and took is told to the engine."""

from __future__ import annotations

import time
from collections import deque
from functools import partial

from phalanx.engine.channel import RankChannel
from phalanx.engine.clock import ClockKeeper
from phalanx.engine.late_result import LateResult
from phalanx.engine.messages import Shutdown, StageStep, StepPlan
from phalanx.engine.rank import Rank
from phalanx.engine.runner import Ran

# A rank tells of its steps when it has nothing to do for so long, or the first of them was so long ago.
REPORT_S = 0.1
MOST_REPORTED_S = 0.5
LOOK_S = 0.001  # between two looks at a GPU's step, where no next one is known


class StepLoop:
    """Runs the steps that the engine plans, one after another, and tells their results.

    The result of a step is told when the next one is about to be computed, where that is known already: in a
    process that the two share, the engine's thread then has the interpreter while the rank needs none. Where a GPU
    is still at it by then, it is told once the GPU has been given that next step.
    """

    def __init__(self, rank: Rank, channel: RankChannel, clock: ClockKeeper) -> None:
        self._rank = rank
        self._channel = channel
        self._clock = clock
        self._plans: deque[StepPlan] = deque()  # heard of, and not run
        self._untold: Ran | None = None  # the last step, where its result has not been told
        self._times: list[StageStep] = []  # of steps that are done, and not reported

    def run(self) -> None:
        """Until the engine says `Shutdown`, and all that it planned before is done."""
        rank, plans, times = self._rank, self._plans, self._times
        tell_early = partial(self._tell_result, waits=False)
        rank.ledger.take()  # what the warm-up took is no part of it
        ending = False
        while plans or not ending:
            while not ending and len(plans) < rank.most_plans:
                message = self._channel.receive(0.0 if plans else self._patience_s())
                if message is None:
                    if plans or self._untold is None:
                        break
                    self._tell_result(waits=False)
                    continue
                ending = isinstance(message, Shutdown)
                if isinstance(message, StepPlan):
                    rank.runner.expect(message)
                    plans.append(message)
            if times and not ending and (not plans or times[-1].ended_s - times[0].started_s > MOST_REPORTED_S):
                self._report()
            if plans:
                try:
                    ran = rank.run(plans.popleft(), tell_early)
                finally:
                    self._tell_result()  # where it failed before that, or a GPU was not through with it
                self._untold = ran if ran.result is not None else None
                if not isinstance(ran.result, LateResult):
                    times.append(ran.times)
        rank.finish()
        self._tell_result()

    def _patience_s(self) -> float | None:
        """How long there is nothing else to do than to hear the next message."""
        result = None if self._untold is None else self._untold.result
        if result is None:
            return REPORT_S if self._times else None
        return LOOK_S if isinstance(result, LateResult) and not result.done() else 0.0

    def _tell_result(self, *, waits: bool = True) -> None:
        """Of the last step. waits: for a GPU that is still at it."""
        if self._untold is None or self._untold.result is None:
            return
        times, result = self._untold.times, self._untold.result
        if isinstance(result, LateResult) and not waits and not result.done():
            return
        self._untold = None
        if isinstance(result, LateResult):
            result = result.read()
            for comm in self._rank.groups.comms:
                comm.check()
            # It began with the step before it done, and is done now, or was since a look that found it so.
            began_s = max(times.started_s, self._times[-1].ended_s if self._times else 0.0)
            self._times.append(times._replace(started_s=began_s, ended_s=time.perf_counter()))
        self._channel.send(result)

    def _report(self) -> None:
        """Tells what was done lately."""
        for report in self._rank.reports(tuple(self._times), self._clock.reading()):
            self._channel.send(report)
        if self._plans:
            self._clock.refresh()  # while the engine is awake
        self._times.clear()
