"""The scheduler as a state machine: random requests, arrivals, aborts, capacities and pipelines."""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.model_ranks import VOCAB, ModelRanks, one_by_one

from phalanx.engine.messages import Sampling, StepPlan, StepResult
from phalanx.engine.scheduler import Limits, Scheduler
from phalanx.errors import RequestError

ALL_TOKENS = bytes([255]) * -(-VOCAB // 8)


class Run:
    """A scheduler and its ranks, with as many steps between a plan and its result as there are stages at most."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.scheduler = Scheduler(limits)
        self.ranks = ModelRanks(limits)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.tokens: dict[int, list[int]] = {}
        self.endings: dict[int, str] = {}
        self.order: list[int] = []
        self.guided: set[int] = set()

    def add(self, name: int, prompt: list[int], max_tokens: int, **options: Any) -> None:
        self.scheduler.check(len(prompt), max_tokens)
        guided = options.pop("guided", False)
        if guided:
            self.guided.add(name)
        mask = ALL_TOKENS if guided else None
        self.scheduler.add(name, prompt, max_tokens, Sampling(num_prompt=len(prompt)), mask=mask, **options)
        self.tokens[name] = []

    def plan(self) -> list[StepPlan]:
        """Makes all plans that can be made now."""
        plans = []
        while (plan := self.scheduler.schedule()) is not None:
            self.in_flight.append((plan, self.ranks.run(plan)))
            plans.append(plan)
        return plans

    def hear(self) -> None:
        """Takes the result of the oldest step in flight."""
        _, result = self.in_flight.popleft()
        stepped = self.scheduler.complete(result)
        for name, token in zip(stepped.names, stepped.tokens, strict=True):
            assert name not in self.endings, "a token for a sequence that has ended"
            self.tokens[name].append(token)
            if name in self.guided and name not in stepped.endings:
                self.scheduler.allow(name, ALL_TOKENS)
        self.endings.update(stepped.endings)
        self.order.extend(stepped.endings)

    def abort(self, name: int) -> None:
        self.scheduler.finish(name)
        self.endings.setdefault(name, "abort")

    def finish(self) -> None:
        while self.scheduler.num_unfinished or self.in_flight:
            self.plan()
            assert self.in_flight, "work is left, and nothing is in flight"
            self.hear()
            audit(self.scheduler)


def audit(scheduler: Scheduler) -> None:
    """Every page is free, kept, or used by as many running sequences as it says; every slot is free or taken once."""
    pool, limits = scheduler._pool, scheduler._limits
    own = [page for each in scheduler._running.values() for page in (*each.own, *each.spare)]
    shared = {page.page: page for page in pool._shared.values()}
    used = [page for page, entry in shared.items() if entry.num_users]
    kept = [entry.page for entry in pool._unused]
    assert sorted([*own, *used, *kept, *pool._free]) == list(range(limits.num_pages))
    users = [entry.page for each in scheduler._running.values() for entry in each.prefix]
    assert all(entry.num_users == users.count(page) for page, entry in shared.items())
    slots = [each.slot for each in scheduler._running.values()]
    assert sorted([*slots, *scheduler._free_slots]) == list(range(limits.max_sequences))
    assert scheduler._backlog == sum(each.backlog for each in scheduler._unfinished.values())
    assert scheduler._num_decoding == sum(each.decoding for each in scheduler._unfinished.values())
    assert all(each.pending <= 2 for each in scheduler._unfinished.values()), "planned twice with a token on its way"


limits_of = st.builds(
    Limits,
    max_sequences=st.integers(1, 6),
    max_batch_tokens=st.integers(1, 40),
    num_pages=st.integers(0, 25),  # beyond what the longest request needs
    page_size=st.sampled_from([1, 4, 16]),
    max_length=st.just(80),
    num_stages=st.integers(1, 4),
    keep_prefixes=st.booleans(),
)
requests_of = st.lists(
    st.fixed_dictionaries(
        {
            "prefix": st.integers(0, 40),  # tokens of a beginning that many have
            "own": st.integers(1, 20),
            "max_tokens": st.integers(1, 20),
            "priority": st.sampled_from([0, 0, 0, -1, 3]),
            "stops": st.booleans(),
            "guided": st.sampled_from([False, False, True]),
            "aborted": st.sampled_from([False, False, False, True]),
        }
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=400)
@given(limits=limits_of, requests=requests_of, seed=st.integers(0, 2**32))
def test_every_request_gets_the_tokens_it_gets_alone_whatever_goes_on_around_it(
    limits: Limits, requests: list[dict[str, Any]], seed: int
) -> None:
    chance = random.Random(seed)
    common = [chance.randrange(VOCAB) for _ in range(40)]
    prompts = [common[: each["prefix"]] + [chance.randrange(VOCAB) for _ in range(each["own"])] for each in requests]
    longest = max(len(prompt) + each["max_tokens"] for prompt, each in zip(prompts, requests, strict=True))
    run = Run(replace(limits, num_pages=limits.num_pages + -(-longest // limits.page_size)))
    arriving = deque(range(len(requests)))
    while arriving:
        event = chance.random()
        if event < 0.3:
            name = arriving.popleft()
            each = requests[name]
            stops = [3, 4, 5] if each["stops"] else []
            run.add(
                name,
                prompts[name],
                each["max_tokens"],
                priority=each["priority"],
                stop_tokens=stops,
                guided=each["guided"],
            )
        elif event < 0.6:
            run.plan()
        elif event < 0.9 and run.in_flight:
            run.hear()
        else:
            for name in run.tokens:
                if requests[name]["aborted"] and chance.random() < 0.3:
                    run.abort(name)
        audit(run.scheduler)
    run.finish()
    assert run.scheduler.stats().pages_used == 0
    assert run.scheduler.stats().running == run.scheduler.stats().waiting == 0
    for name, each in enumerate(requests):
        alone = one_by_one(prompts[name], each["max_tokens"], [3, 4, 5] if each["stops"] else [])
        if run.endings[name] == "abort":
            assert run.tokens[name] == alone[: len(run.tokens[name])]
        else:
            assert run.tokens[name] == alone
            assert run.endings[name] == ("stop" if each["stops"] and alone[-1] in (3, 4, 5) else "length")


@settings(max_examples=100)
@given(limits=limits_of, requests=requests_of)
def test_requests_of_one_priority_and_length_end_in_the_order_they_came(
    limits: Limits, requests: list[dict[str, Any]]
) -> None:
    """However tight the memory is, and whoever is preempted."""
    run = Run(replace(limits, num_pages=limits.num_pages + -(-80 // limits.page_size), max_batch_tokens=40))
    for name, each in enumerate(requests):
        run.add(name, [name % VOCAB] * (each["own"] + each["prefix"]), 20)
    started: list[int] = []
    while run.scheduler.num_unfinished:
        run.plan()
        run.hear()
        started.extend(name for name in run.tokens if run.tokens[name] and name not in started)
    assert started == sorted(started)
    assert sorted(run.order) == list(range(len(requests)))


@settings(max_examples=100)
@given(
    num_stages=st.integers(1, 5),
    requests=st.lists(st.tuples(st.integers(1, 60), st.integers(2, 12)), min_size=1, max_size=20),
    max_batch_tokens=st.integers(16, 64),
)
def test_a_micro_batch_is_in_flight_for_each_stage_while_there_is_work_for_so_many(
    num_stages: int, requests: list[tuple[int, int]], max_batch_tokens: int
) -> None:
    run = Run(Limits(32, max_batch_tokens, 400, 4, 80, num_stages))
    for name, (prompt, new) in enumerate(requests):
        run.add(name, [name] * prompt, new)
    while run.scheduler.num_unfinished:
        run.plan()
        unfinished = [each for each in run.scheduler._unfinished.values() if len(each.tokens) + each.pending < each.end]
        assert len(run.in_flight) >= min(num_stages, len(unfinished))
        assert len(run.in_flight) <= num_stages + 1
        run.hear()


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_micro_batches_are_balanced_in_tokens(num_stages: int) -> None:
    """Prompts and decodes both."""
    run = Run(Limits(64, 4096, 4000, 16, 800, num_stages))
    for name in range(24):
        run.add(name, [name] * 600, 40)
    plans = run.plan()
    while run.scheduler.num_unfinished:
        run.hear()
        plans += run.plan()
    prompts = [sum(len(chunk.tokens) for chunk in plan.chunks) for plan in plans]
    filled = [tokens for tokens in prompts if tokens]
    assert len(set(filled[:-1])) == 1
    assert len(filled) >= 2 * num_stages
    decodes = [len(plan.decodes) for plan in plans if not plan.chunks and plan.step < plans[-1].step // 2]
    assert max(decodes) - min(decodes) <= 1


def test_a_sequence_comes_back_when_the_other_micro_batches_have_had_their_turn() -> None:
    run = Run(Limits(8, 100, 100, 16, 100, num_stages=3))
    for name in range(6):
        run.add(name, [name + 1, 2, 3], 20)
    steps: dict[int, list[int]] = {}
    for _ in range(30):
        for plan in run.plan():
            for slot in plan.decodes:
                steps.setdefault(slot, []).append(plan.step)
        run.hear()
    for drawn in steps.values():
        assert {later - earlier for earlier, later in pairwise(drawn[2:])} == {3}


def test_one_sequence_alone_is_planned_ahead_of_its_token() -> None:
    run = Run(Limits(8, 100, 100, 16, 100, num_stages=2))
    run.add(0, [1, 2, 3], 20)
    assert [(len(plan.chunks), len(plan.decodes)) for plan in run.plan()] == [(1, 0), (0, 1)]


def test_a_long_prompt_is_cut_into_chunks_that_follow_each_other_and_only_the_last_draws() -> None:
    run = Run(Limits(4, 10, 10, 16, 100, num_stages=2))
    run.add(0, list(range(25)), 1)
    chunks = [plan.chunks[0] for plan in run.plan()]
    assert [(chunk.start, len(chunk.tokens), chunk.sample) for chunk in chunks] == [
        (0, 10, False),
        (10, 10, False),
        (20, 5, True),
    ]


def test_decodes_go_on_beside_a_long_prompt() -> None:
    run = Run(Limits(4, 10, 100, 16, 100))
    run.add(0, [1], 30)
    run.plan()
    run.add(1, [2] * 60, 2)
    run.hear()
    for _ in range(6):
        [plan] = run.plan()
        assert len(plan.decodes) == 1
        assert plan.num_tokens == 10
        run.hear()


def test_an_aborted_sequence_leaves_its_pages_and_its_slot_to_the_next_plan() -> None:
    run = Run(Limits(1, 100, 2, 16, 32, keep_prefixes=False))
    run.add(0, [1] * 16, 16)
    run.add(1, [2] * 16, 16)
    assert len(run.plan()) == 2
    run.abort(0)
    assert run.scheduler.stats().pages_used == 0
    run.hear()
    [plan] = run.plan()
    assert [new.slot for new in plan.new] == [0]
    run.finish()
    assert run.tokens[1] == one_by_one([2] * 16, 16)


def test_a_waiting_request_can_be_aborted() -> None:
    run = Run(Limits(1, 100, 2, 16, 32))
    run.add(0, [1], 1)
    run.abort(0)
    assert run.scheduler.num_unfinished == 0
    assert run.plan() == []


def test_a_prefix_is_computed_once_even_by_requests_that_come_together() -> None:
    run = Run(Limits(8, 100, 100, 4, 100))
    prefix = list(range(20))
    for name in range(3):
        run.add(name, [*prefix, 30 + name], 4)
    [plan, *_] = run.plan()
    assert [(chunk.start, len(chunk.tokens)) for chunk in plan.chunks] == [(0, 21), (20, 1), (20, 1)]
    stats = run.scheduler.stats()
    assert (stats.prompt_tokens, stats.prompt_tokens_cached) == (63, 40)
    assert stats.pages_used == 5 + 3
    run.finish()
    assert run.tokens[2] == one_by_one([*prefix, 32], 4)


def test_what_a_finished_request_has_computed_serves_a_follow_up() -> None:
    run = Run(Limits(8, 100, 100, 4, 100))
    prompt = list(range(10))
    run.add(0, prompt, 10)
    run.finish()
    assert run.scheduler.stats().pages_kept == 4  # 19 tokens were run
    run.add(1, [*prompt, *run.tokens[0], 1, 2], 3)
    [plan, *_] = run.plan()
    assert plan.chunks[0].start == 16
    run.finish()
    assert run.tokens[1] == one_by_one([*prompt, *run.tokens[0], 1, 2], 3)


def test_the_prefix_used_longest_ago_gives_way_first() -> None:
    run = Run(Limits(8, 100, 8, 4, 32))
    for name, first in enumerate((1, 2, 1)):
        run.add(name, [first] * 12, 1)
        run.finish()
    run.add(3, [3] * 12, 1)  # 2 of the 8 pages are free: one more is needed, the last of prompt 2
    run.finish()
    cached = run.scheduler.stats().prompt_tokens_cached
    run.add(4, [1] * 12, 1)
    run.finish()
    assert run.scheduler.stats().prompt_tokens_cached - cached == 8
    run.add(5, [2] * 12, 1)
    run.finish()
    assert run.scheduler.stats().prompt_tokens_cached - cached < 16


def test_memory_that_runs_out_preempts_the_youngest_which_then_goes_on() -> None:
    run = Run(Limits(4, 100, 8, 4, 32, keep_prefixes=False))
    for name in range(3):
        run.add(name, [name + 1] * 6, 20)
    run.finish()
    assert run.scheduler.stats().preemptions > 0
    assert run.order == [0, 1, 2]
    assert run.tokens == {name: one_by_one([name + 1] * 6, 20) for name in range(3)}


def test_a_newcomer_waits_where_it_would_be_preempted_at_once() -> None:
    """The pages are there, but the sequence that runs will need one of them some steps later."""
    run = Run(Limits(4, 100, 8, 4, 32, keep_prefixes=False))
    run.add(0, [1] * 6, 8)
    run.plan()
    run.add(1, [2] * 24, 8)
    run.finish()
    assert run.scheduler.stats().preemptions == 0
    assert run.order == [0, 1]


def test_no_page_is_taken_for_the_last_token_which_is_never_run() -> None:
    run = Run(Limits(4, 100, 8, 4, 32, keep_prefixes=False))
    run.add(0, [1] * 4, 5)
    used = []
    while run.scheduler.num_unfinished:
        run.plan()
        used.append(run.scheduler.stats().pages_used)
        run.hear()
    assert max(used) == 2


def test_of_a_prefix_that_nobody_uses_the_last_page_gives_way_first() -> None:
    run = Run(Limits(4, 100, 4, 4, 16))
    run.add(0, list(range(12)), 1)  # three pages of a prefix
    run.finish()
    run.add(1, [40] * 8, 1)  # two pages: the free one, and one of these
    run.finish()
    run.add(2, list(range(12)), 1)
    run.finish()
    assert run.scheduler.stats().prompt_tokens_cached == 8


def test_a_prompt_counts_once_however_often_it_is_run_again() -> None:
    run = Run(Limits(2, 4, 8, 4, 32))
    run.add(0, [1] * 12, 4, priority=1)
    run.plan()  # a chunk of its prompt
    run.hear()
    run.add(1, [2] * 24, 4, priority=0)
    run.finish()
    stats = run.scheduler.stats()
    assert (stats.preemptions, stats.prompt_tokens) == (1, 36)


def test_an_urgent_request_takes_the_place_of_a_less_urgent_one() -> None:
    run = Run(Limits(1, 100, 8, 4, 32))
    run.add(0, [1] * 4, 20, priority=1)
    run.plan()
    run.hear()
    run.add(1, [2] * 4, 2, priority=0)
    run.finish()
    assert run.order == [1, 0]
    assert run.tokens[0] == one_by_one([1] * 4, 20)


def test_an_urgent_request_does_not_disturb_others_where_there_is_room() -> None:
    run = Run(Limits(2, 100, 16, 4, 32))
    run.add(0, [1] * 4, 20, priority=1)
    run.plan()
    run.add(1, [2] * 4, 2, priority=0)
    run.finish()
    assert run.scheduler.stats().preemptions == 0


def test_a_guided_sequence_waits_for_its_token_and_carries_its_mask() -> None:
    run = Run(Limits(2, 100, 16, 4, 32))
    run.add(0, [1] * 4, 5, guided=True)
    run.add(1, [2] * 4, 5)
    first, second = run.plan()
    assert first.masks == ((0, ALL_TOKENS),)
    assert second.decodes == (1,)
    run.hear()
    assert [plan.masks for plan in run.plan()] == [((0, ALL_TOKENS),)]


def test_what_was_drawn_before_a_preemption_is_told_where_penalties_need_it() -> None:
    scheduler = Scheduler(Limits(1, 100, 8, 4, 32))
    scheduler.add(0, [1, 2], 9, Sampling(num_prompt=2, history=(1, 2)), priority=1)
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.new[0].sampling.history == (1, 2)
    scheduler.complete(StepResult(0, (7,)))
    scheduler.add(1, [5], 1, Sampling(num_prompt=1))
    for step in (1, 2):
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.complete(StepResult(step, (8,)))
    assert plan.new[0].sampling.history == (1, 2, 7)
    assert plan.new[0].sampling.num_prompt == 2


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (0, 5, "no tokens"),
        (90, 20, "prompt has 90 tokens and asks for 20 more, 110 in all, but at most 100 fit"),
        (60, 30, "90 tokens, but the KV cache holds 64; raise engine.kv_cache"),
    ],
)
def test_a_request_that_can_never_run_is_refused_with_figures(prompt: int, new: int, message: str) -> None:
    scheduler = Scheduler(Limits(4, 100, 4, 16, 100))
    with pytest.raises(RequestError, match=message):
        scheduler.check(prompt, new)


def test_nobody_gives_way_where_that_would_not_help() -> None:
    """The urgent newcomer waits for the one as urgent as itself, which holds what it lacks."""
    run = Run(Limits(4, 100, 10, 4, 40, keep_prefixes=False))
    run.add(0, [1] * 24, 4, priority=0)
    run.add(1, [2] * 3, 20, priority=5)
    run.plan()
    run.add(2, [3] * 33, 4, priority=0)
    run.plan()
    run.hear()
    run.plan()
    assert run.scheduler.stats().preemptions == 0
    run.finish()
    assert sorted(run.order) == [0, 1, 2]


def test_guided_sequences_keep_up_with_the_others() -> None:
    run = Run(Limits(8, 100, 100, 16, 400, num_stages=2))
    for name in range(8):
        run.add(name, [name + 1], 300, guided=name % 2 == 0)
    for _ in range(200):
        run.plan()
        run.hear()
    guided = sum(len(run.tokens[name]) for name in range(0, 8, 2))
    plain = sum(len(run.tokens[name]) for name in range(1, 8, 2))
    assert guided > 0.45 * plain


def least_cost_s(num_sequences: int) -> float:
    """Thread time of a step that decodes so many sequences, for each of them; the least of many steps."""
    scheduler = Scheduler(Limits(num_sequences, 10**6, 20 * num_sequences, 16, 10**6))
    for name in range(num_sequences):
        scheduler.add(name, [name] * (1 + name % 16), 200, Sampling(num_prompt=1 + name % 16), stop_tokens=[0])
    costs = []
    for step in range(100):
        started_s = time.thread_time()
        while scheduler.schedule() is not None:
            pass
        scheduler.complete(StepResult(step, (1,) * num_sequences))
        costs.append((time.thread_time() - started_s) / num_sequences)
    return min(costs[10:])


def test_the_cost_of_a_sequence_does_not_grow_with_their_number() -> None:
    few = min(least_cost_s(64) for _ in range(3))
    many = min(least_cost_s(512) for _ in range(3))
    assert many < 2 * few
