"""Rates that follow what steps take: when they move, and that all ranks move them alike, whatever each has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.rank_threads import Join, run_ranks

from phalanx.comm.ledger import UNKNOWN_S
from phalanx.parallel.followed import FADES, MOST_UNREAD, fading_median
from phalanx.parallel.overlap import Overlap, StageWork, serial_times
from phalanx.parallel.rates import Rates

TOKENS = 1024
# A token of a block of the work takes 6 ms of products, and its sum 6 ms at 1/3 MB/s.
WORK = StageWork(
    num_layers=4,
    attention=3_000_000,
    ffn=3_000_000,
    hidden=1000,
    attention_inputs=1000,
    ffn_inputs=1000,
    itemsize=2,
)
START = Rates(flops_per_s=1e9, latency_s=1e-6, bytes_per_s=1e6 / 3)


class Seen(NamedTuple):
    """What a rank sees of a step, in what the start's rates say: of computing, of a sum on the rank that came last, and
    of one on a rank that waited for the other.
    """

    computing: float = 1.0
    sum: float = 1.0
    awaited: float = 1.0


def follow(*ranks: Sequence[Seen]) -> list[list[tuple[str, str]]]:
    """By rank: how sums are hidden, and why, at the start and behind each step, on a clock that the steps move."""
    computing_s, _, _ = serial_times(TOKENS, WORK, START)
    num_bytes = TOKENS * WORK.hidden * WORK.itemsize

    def run(rank: int, join: Join) -> list[tuple[str, str]]:
        comm = join("stage", rank, len(ranks))
        ledger, overlap = comm.ledger, Overlap("auto", WORK, START)
        now_s = 0.0
        ledger.clock_s = lambda: now_s
        overlap.follow(comm)
        found = [overlap.way(TOKENS)[:2]]
        for step, seen in enumerate(ranks[rank]):
            ledger.begin_step(step)
            with overlap.over(TOKENS):
                for number in range(2 * WORK.num_layers):
                    now_s += seen.computing * computing_s / 2 / WORK.num_layers
                    # By turns the ranks come late to a sum, and wait for it the less.
                    times = seen.sum if number % len(ranks) == rank else seen.awaited
                    took_s = times * START.transfer_s(TOKENS, WORK.hidden, WORK.itemsize) + START.latency_s
                    if times < 0:
                        took_s = UNKNOWN_S
                    waited_s = max(0.0, took_s)
                    ledger.record(
                        number, comm.group, "all_reduce", num_bytes, now_s, waited_s, now_s + waited_s, took_s=took_s
                    )
                    now_s += waited_s
            found.append(overlap.way(TOKENS)[:2])
        return found

    return run_ranks(len(ranks), run)


def names(found: Sequence[tuple[str, str]]) -> list[str]:
    return [name for name, _ in found]


def test_a_link_that_becomes_slow_and_fast_again_moves_the_choice_and_its_reason() -> None:
    slow, fast = Seen(sum=20.0, awaited=20.0), Seen()
    own, other = follow(*[[fast] * 2 + [slow] * 5 + [fast] * 3] * 2)
    assert own == other
    # Two readings alike are believed; where sums take twenty times as long as computing there is little to hide.
    assert names(own) == ["parts"] * 4 + ["none"] * 5 + ["parts"] * 2
    assert (
        "steps up to 3 took them, sums at 0.0167 MB/s and products at 1 GFLOP/s; at the start 0.333 and 1" in own[4][1]
    )
    assert "too little" in own[4][1]
    assert "steps up to 8 took them, sums at 0.333 MB/s" in own[9][1]
    assert "as steps" not in own[0][1]


def test_ranks_that_have_seen_unlike_times_decide_alike() -> None:
    """Each waits for the other by turns, which is no fault of the link; and the slower one's computing counts."""
    own, other = follow([Seen(awaited=20.0)] * 3, [Seen(computing=20.0, awaited=30.0)] * 3)
    assert own == other
    assert names(own) == ["parts"] * 2 + ["none"] * 2
    assert "sums at 0.333 MB/s and products at 0.05 GFLOP/s" in own[-1][1]


@pytest.mark.parametrize(
    "steps",
    [
        [Seen(), Seen(sum=100.0, awaited=100.0), Seen(), Seen(computing=50.0), Seen()],  # one reading is none
        [Seen(computing=1.2, sum=1.2, awaited=1.2)] * 6,  # what does not matter
        [Seen(sum=0.05, awaited=0.05)] * 6,  # sums of which a part had passed before
        [Seen(sum=-1.0, awaited=-1.0)] * 3,  # a backend that does not say how long its transfers took
    ],
)
def test_single_small_and_missing_readings_move_nothing(steps: Sequence[Seen]) -> None:
    own, other = follow(steps, steps)
    assert own == other
    assert len(set(own)) == 1


def test_steps_without_rates_or_with_few_tokens_are_not_watched() -> None:
    def run(rank: int, join: Join) -> list[int]:
        comm = join("stage", rank, 2)
        found = []
        asked = ((Overlap("auto", WORK, START), 64), (Overlap("parts", WORK), 512), (Overlap(), 512))
        for overlap, num_tokens in asked:
            overlap.follow(comm)
            with overlap.over(num_tokens):
                pass
            found.append(comm.ledger.num_recorded)
        return found

    assert run_ranks(2, run) == [[0, 0, 0]] * 2


# Predicted are 8 latencies of a step's own sums, too: one more for every fourth step is less than a 200th.
@pytest.mark.parametrize(("latency", "num_readings"), [(1 / 50, 5), (1.0, 20 // (MOST_UNREAD + 1)), (1e-6, 20)])
def test_ranks_agree_no_oftener_than_it_is_worth(latency: float, num_readings: int) -> None:
    """latency: in steps."""

    def run(rank: int, join: Join) -> int:
        comm = join("stage", rank, 2)
        _, _, step_s = serial_times(128, WORK, START)
        overlap = Overlap("auto", WORK, START._replace(latency_s=latency * step_s))
        overlap.follow(comm)
        for _ in range(20):
            with overlap.over(128):
                pass
        return comm.ledger.num_recorded

    assert run_ranks(2, run) == [num_readings] * 2


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=8))
def test_the_fading_median_has_no_more_than_half_of_the_weight_on_either_side(values: list[float]) -> None:
    found = fading_median(values)
    weights = [FADES**age for age in reversed(range(len(values)))]
    below = sum(weight for value, weight in zip(values, weights, strict=True) if value < found)
    above = sum(weight for value, weight in zip(values, weights, strict=True) if value > found)
    assert max(below, above) <= sum(weights) / 2 * (1 + 1e-9)
