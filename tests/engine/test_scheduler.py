"""The scheduler as a state machine: random requests, capacities and finishes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.engine.messages import NewSequence, SampledToken, StepPlan, StepResult
from phalanx.engine.scheduler import Limits, Scheduler
from phalanx.errors import RequestError


def sequence(name: int) -> NewSequence:
    return NewSequence(name, seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, logprobs=-1)


class Ranks:
    """What ranks would keep, checking that each plan makes sense to them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.pages: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for name in plan.dropped:
            del self.pages[name]
            del self.tokens[name]
        for new in plan.new:
            assert new.sequence not in self.pages
            self.pages[new.sequence] = []
            self.tokens[new.sequence] = []
        drawn = []
        assert plan.work
        assert sum(len(work.tokens) for work in plan.work) <= self.limits.max_batch_tokens
        for work in plan.work:
            assert work.tokens
            assert work.start == len(self.tokens[work.sequence])
            self.tokens[work.sequence].extend(work.tokens)
            self.pages[work.sequence].extend(work.pages)
            assert len(self.pages[work.sequence]) * self.limits.page_size >= len(self.tokens[work.sequence])
            if work.sample:
                drawn.append(SampledToken(work.sequence, 1000 + len(self.tokens[work.sequence]), None, ()))
        held = [page for pages in self.pages.values() for page in pages]
        assert len(held) == len(set(held)), "a page is used twice"
        assert all(0 <= page < self.limits.num_pages for page in held)
        assert len(self.pages) <= self.limits.max_sequences + len(plan.dropped)
        return StepResult(plan.step, tuple(drawn), 1.0)


@settings(max_examples=200, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=12),
    max_sequences=st.integers(1, 5),
    max_batch_tokens=st.integers(1, 40),
    spare_pages=st.integers(0, 20),
    page_size=st.sampled_from([1, 4, 16]),
    num_stages=st.integers(1, 4),
)
def test_every_request_ends_with_all_its_tokens_in_any_capacity(
    requests: list[tuple[int, int]],
    max_sequences: int,
    max_batch_tokens: int,
    spare_pages: int,
    page_size: int,
    num_stages: int,
) -> None:
    longest = max(-(-(prompt + new) // page_size) for prompt, new in requests)
    limits = Limits(max_sequences, max_batch_tokens, longest + spare_pages, page_size, 80, num_stages)
    scheduler, ranks = Scheduler(limits), Ranks(limits)
    for name, (prompt, new) in enumerate(requests):
        scheduler.add(sequence(name), list(range(prompt)), new)
    produced: dict[int, list[int]] = {name: [] for name in range(len(requests))}
    in_flight: list[StepResult] = []
    while scheduler.num_unfinished:
        while (plan := scheduler.schedule()) is not None:
            in_flight.append(ranks.run(plan))
        assert 0 < len(in_flight) <= num_stages
        result = in_flight.pop(0)
        scheduler.complete(result)
        for drawn in result.tokens:
            produced[drawn.sequence].append(drawn.token)
            if len(produced[drawn.sequence]) == requests[drawn.sequence][1]:
                scheduler.finish(drawn.sequence)
    for name, (prompt, new) in enumerate(requests):
        assert produced[name] == [1000 + prompt + index for index in range(new)]


def test_a_long_prompt_is_cut_into_chunks_and_only_its_last_draws() -> None:
    scheduler = Scheduler(Limits(4, 10, 10, 16, 100))
    scheduler.add(sequence(0), list(range(25)), 4)
    chunks = []
    for _ in range(3):
        plan = scheduler.schedule()
        assert plan is not None
        chunks.append((plan.work[0].start, len(plan.work[0].tokens), plan.work[0].sample))
        scheduler.complete(StepResult(plan.step, (), 1.0))
    assert chunks == [(0, 10, False), (10, 10, False), (20, 5, True)]


def test_two_stages_get_two_micro_batches_of_equal_numbers() -> None:
    scheduler = Scheduler(Limits(8, 100, 100, 16, 100, num_stages=2))
    for name in range(6):
        scheduler.add(sequence(name), [1, 2, 3], 4)
    plans = [scheduler.schedule(), scheduler.schedule()]
    assert [[work.sequence for work in plan.work] for plan in plans if plan] == [[0, 1, 2], [3, 4, 5]]
    assert scheduler.schedule() is None


def test_finishing_in_flight_frees_the_pages_once_the_step_is_in() -> None:
    scheduler = Scheduler(Limits(1, 100, 2, 16, 32))
    scheduler.add(sequence(0), [1] * 16, 16)
    scheduler.add(sequence(1), [1] * 16, 16)
    first = scheduler.schedule()
    assert first is not None
    scheduler.finish(0)
    assert scheduler.num_unfinished == 2
    scheduler.complete(StepResult(first.step, (SampledToken(0, 5, None, ()),), 1.0))
    second = scheduler.schedule()
    assert second is not None
    assert second.dropped == (0,)
    assert [new.sequence for new in second.new] == [1]


def test_a_waiting_request_can_be_finished() -> None:
    scheduler = Scheduler(Limits(1, 100, 2, 16, 32))
    scheduler.add(sequence(0), [1], 1)
    scheduler.finish(0)
    assert scheduler.num_unfinished == 0
    assert scheduler.schedule() is None


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (0, 5, "no tokens"),
        (90, 20, "prompt has 90 tokens and asks for 20 more, 110 in all, but at most 100 fit"),
        (40, 40, "80 tokens, but the KV cache holds 64"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_figures(prompt: int, new: int, message: str) -> None:
    scheduler = Scheduler(Limits(1, 100, 4, 16, 100))
    with pytest.raises(RequestError, match=message):
        scheduler.add(sequence(0), [1] * prompt, new)
    assert scheduler.num_unfinished == 0
