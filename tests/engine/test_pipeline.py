"""The scheduler over a simulated pipeline: how long stages wait. Time is computed, not measured, so it is exact."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
from tests.engine.model_ranks import VOCAB

from phalanx.engine.messages import Sampling, StepPlan, StepResult
from phalanx.engine.scheduler import Limits, Scheduler

Cost = Callable[[StepPlan], float]


class Worked(NamedTuple):
    """When a stage worked on a step."""

    start: float
    end: float


class Pipeline:
    """Stages that take what `costs` say for a step, and begin one when they have their input.

    hop: from a stage to the next, or from the last to the first with tokens. answer: from the last stage to the engine
    and back with a plan.
    """

    def __init__(self, costs: Sequence[Cost], hop: float = 0.0, answer: float = 0.0) -> None:
        self._costs = costs
        self._hop = hop
        self._answer = answer
        self.steps: list[list[Worked]] = [[] for _ in costs]
        self._drawn_at: dict[int, float] = {}  # when a slot's last token reaches the first stage

    def run(self, scheduler: Scheduler) -> None:
        """Everything that the scheduler has to do."""
        in_flight: deque[StepPlan] = deque()
        results: list[tuple[float, int, StepPlan]] = []
        now = 0.0
        while scheduler.num_unfinished or results:
            while (plan := scheduler.schedule()) is not None:
                in_flight.append(plan)
                end = self._pass(plan, now)
                heapq.heappush(results, (end + self._answer, plan.step, plan))
            now, _, plan = heapq.heappop(results)
            scheduler.complete(StepResult(plan.step, tuple([1] * len(plan.drawn_slots))))

    def _pass(self, plan: StepPlan, sent: float) -> float:
        ready = max([sent, *(self._drawn_at[slot] for slot in plan.decodes)])
        for stage, cost in enumerate(self._costs):
            before = self.steps[stage][-1].end if self.steps[stage] else 0.0
            start = max(before, ready)
            self.steps[stage].append(Worked(start, start + cost(plan)))
            ready = self.steps[stage][-1].end + self._hop
        self._drawn_at.update(dict.fromkeys(plan.drawn_slots, ready))
        return ready

    def busy(self) -> list[float]:
        """The share of the time that each stage worked while the pipeline was full."""
        start = self.steps[-1][0].start
        end = self.steps[0][-1].end
        return [
            sum(max(0.0, min(step.end, end) - max(step.start, start)) for step in steps) / (end - start)
            for steps in self.steps
        ]


def linear(layers: float) -> Cost:
    """Reading the weights of the layers, and computing on the tokens: the form that every device has."""
    return lambda plan: layers * (1.0 + 0.02 * plan.num_tokens)


def w2(num_stages: int, max_batch_tokens: int = 1024) -> Scheduler:
    """32 requests of 16 to 256 tokens, 64 new each."""
    scheduler = Scheduler(Limits(64, max_batch_tokens, 4000, 16, 512, num_stages))
    chance = random.Random(0)
    for name in range(32):
        length = chance.randint(16, 256)
        prompt = [chance.randrange(VOCAB) for _ in range(length)]
        scheduler.add(name, prompt, 64, Sampling(num_prompt=length))
    return scheduler


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("budget", [256, 1024])
def test_equal_stages_are_busy_nine_tenths_of_the_time(num_stages: int, budget: int) -> None:
    pipeline = Pipeline([linear(8)] * num_stages, hop=0.05, answer=2.0)
    pipeline.run(w2(num_stages, max_batch_tokens=budget))
    assert min(pipeline.busy()) >= 0.9


def test_stages_do_not_wait_for_an_engine_that_answers_late() -> None:
    """Its answers take as long as a stage's step of one token."""
    prompt = Pipeline([linear(8)] * 2)
    late = Pipeline([linear(8)] * 2, answer=8.0)
    for pipeline in (prompt, late):
        pipeline.run(w2(2))
    assert late.steps[-1][-1].end <= 1.02 * prompt.steps[-1][-1].end


@pytest.mark.parametrize("layers", [(10, 20), (20, 10), (10, 20, 10), (10, 10, 20)])
def test_the_slowest_stage_keeps_the_others_waiting_no_longer_than_its_excess(layers: tuple[int, ...]) -> None:
    """A stage of twice the layers is busy all the time; the others wait for what it takes longer, and no more."""
    pipeline = Pipeline([linear(each) for each in layers])
    pipeline.run(w2(len(layers)))
    busy = pipeline.busy()
    slowest = layers.index(max(layers))
    assert busy[slowest] >= 0.97
    for stage, share in enumerate(busy):
        assert 1 - share <= (1 - layers[stage] / max(layers)) + 0.05


def test_a_single_request_loses_no_time_to_the_engine() -> None:
    """One sequence cannot fill a pipeline, but its next step is there when its token is."""
    times = []
    for answer in (0.0, 8.0):
        pipeline = Pipeline([linear(8)] * 2, answer=answer)
        scheduler = Scheduler(Limits(4, 100, 100, 16, 100, num_stages=2))
        scheduler.add(0, [1, 2, 3], 40, Sampling(num_prompt=3))
        pipeline.run(scheduler)
        times.append(pipeline.steps[-1][-1].end)
    assert times[1] <= times[0] * 1.01


def test_one_long_prompt_fills_the_pipeline_by_its_chunks() -> None:
    pipeline = Pipeline([linear(8)] * 4)
    scheduler = Scheduler(Limits(4, 512, 1000, 16, 8192, num_stages=4))
    scheduler.add(0, [1] * 8000, 1, Sampling(num_prompt=8000))
    pipeline.run(scheduler)
    assert min(pipeline.busy()) >= 0.95
