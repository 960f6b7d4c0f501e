"""Steps that never end are noticed: since when nothing came, and which stages told nothing."""

from __future__ import annotations

import pytest
from tests.launcher.fake_ranks import SHAPE

from phalanx.launcher.step_watch import SLACK_S, Overdue, StepWatch, stuck_error
from phalanx.parallel.layout import StageRequest, build_layout


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> StepWatch:
    return StepWatch(2, 3.0, clock)


def test_an_idle_formation_is_never_overdue(watch: StepWatch, clock: Clock) -> None:
    clock.now_s += 1e6
    assert watch.overdue() is None
    watch.planned(0)
    watch.done(0)
    clock.now_s += 1e6
    assert watch.overdue() is None


def test_each_stage_has_the_limit_of_an_operation_and_some_slack(watch: StepWatch, clock: Clock) -> None:
    watch.planned(0)
    clock.now_s += 2 * 3.0 + SLACK_S
    assert watch.overdue() is None
    clock.now_s += 0.5
    assert watch.overdue() == Overdue(0, 2 * 3.0 + SLACK_S + 0.5, (0, 1))


def test_every_result_starts_the_time_anew_and_so_does_a_step_after_a_pause(watch: StepWatch, clock: Clock) -> None:
    for step in range(3):
        watch.planned(step)
    for step in range(2):
        clock.now_s += 10
        watch.done(step)
    assert watch.overdue() is None
    watch.done(2)
    clock.now_s += 1e6
    watch.planned(3)
    assert watch.overdue() is None


def test_the_stages_that_told_nothing_of_the_oldest_step_are_named(watch: StepWatch, clock: Clock) -> None:
    layout = build_layout(SHAPE, [StageRequest(num_ranks=1), StageRequest(num_ranks=2)])
    places = list(layout.places())
    watch.planned(0)
    watch.planned(1)
    watch.done(0)
    watch.told(0, 1)
    watch.told(1, 0)
    clock.now_s += 100
    overdue = watch.overdue()
    assert overdue == Overdue(1, 100.0, (1,))
    error = stuck_error(overdue, layout, places, {0: "alpha", 1: "beta", 2: "gamma"})
    assert error.rank == 1
    assert "step 1 has had no result for 100.0 s" in str(error)
    assert "rank 1 (replica 0, stage 1, tensor rank 0) on node beta" in str(error)
    assert "tensor rank 1) on node gamma" in str(error)
    assert "alpha" not in str(error)


def test_a_stage_alone_may_take_as_long_as_it_needs() -> None:
    now_s = 0.0
    watch = StepWatch(1, 3.0, lambda: now_s)
    watch.planned(0)
    now_s = 1e6
    assert watch.overdue() is None
