"""The workloads: what they promise of lengths, ids and arrivals, and that a seed fixes them."""

from __future__ import annotations

import math
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import RequestError
from phalanx.launcher.bench.workloads import (
    WORKLOADS,
    LengthDistribution,
    OpenLoop,
    RequestShape,
    WorkloadName,
    workload,
)

SEEDS = st.integers(0, 2**32)
VOCAB_SIZE = 49_152
MANY = OpenLoop(rate_per_s=5.0, num_requests=4000)


def prompt_lengths(shapes: list[RequestShape]) -> list[int]:
    return [len(shape.prompt) for shape in shapes]


@given(st.sampled_from(sorted(WORKLOADS)), SEEDS)
def test_a_seed_gives_the_same_requests_again(name: WorkloadName, seed: int) -> None:
    assert workload(name, vocab_size=VOCAB_SIZE, seed=seed) == workload(name, vocab_size=VOCAB_SIZE, seed=seed)


def test_a_seed_gives_the_same_requests_in_another_process() -> None:
    program = (
        "from phalanx.launcher.bench.workloads import workload\n"
        f"print(repr(workload('W4', vocab_size={VOCAB_SIZE}, seed=3)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(workload("W4", vocab_size=VOCAB_SIZE, seed=3))


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_another_seed_gives_other_prompts(name: WorkloadName) -> None:
    first, second = (workload(name, vocab_size=VOCAB_SIZE, seed=seed) for seed in (0, 1))
    assert [shape.prompt for shape in first] != [shape.prompt for shape in second]


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_no_prompt_repeats_another(name: WorkloadName) -> None:
    prompts = [shape.prompt for shape in workload(name, vocab_size=VOCAB_SIZE)]
    assert len(set(prompts)) == len(prompts)


@given(st.sampled_from(sorted(WORKLOADS)), st.integers(2, 200_000), SEEDS)
def test_ids_are_ordinary_ones_of_the_vocabulary(name: WorkloadName, vocab_size: int, seed: int) -> None:
    ids = {token for shape in workload(name, vocab_size=vocab_size, seed=seed) for token in shape.prompt}
    assert max(ids) < min(40_000, vocab_size)
    assert min(ids) >= min(1_000, vocab_size // 2)


@given(SEEDS)
def test_w1_is_one_request_of_64_tokens_for_128(seed: int) -> None:
    (shape,) = workload("W1", vocab_size=VOCAB_SIZE, seed=seed)
    assert (len(shape.prompt), shape.max_tokens, shape.arrival_s) == (64, 128, 0.0)


@given(SEEDS)
def test_w2_is_32_requests_of_16_to_256_tokens_for_64(seed: int) -> None:
    shapes = workload("W2", vocab_size=VOCAB_SIZE, seed=seed)
    assert len(shapes) == 32
    assert 16 <= min(prompt_lengths(shapes)) < max(prompt_lengths(shapes)) <= 256
    assert {(shape.max_tokens, shape.arrival_s) for shape in shapes} == {(64, 0.0)}


@given(SEEDS)
def test_w3_is_8_requests_of_1024_tokens_for_1(seed: int) -> None:
    shapes = workload("W3", vocab_size=VOCAB_SIZE, seed=seed)
    assert [(len(shape.prompt), shape.max_tokens, shape.arrival_s) for shape in shapes] == [(1024, 1, 0.0)] * 8


@given(SEEDS, st.integers(1, 40), st.integers(0, 60), st.floats(1, 500), st.floats(0, 3))
def test_w4_clips_its_lengths(seed: int, least: int, spread: int, median: float, sigma: float) -> None:
    lengths = LengthDistribution(median, sigma, least, least + spread)
    open_loop = OpenLoop(num_requests=20, prompt_tokens=lengths, output_tokens=lengths)
    shapes = workload("W4", vocab_size=VOCAB_SIZE, seed=seed, open_loop=open_loop)
    drawn = [*prompt_lengths(shapes), *(shape.max_tokens for shape in shapes)]
    assert least <= min(drawn) <= max(drawn) <= least + spread


def test_w4_lengths_have_the_median_and_spread_of_their_distribution() -> None:
    lengths = LengthDistribution(median=200, sigma=0.5, least=1, most=100_000)
    open_loop = OpenLoop(num_requests=4000, prompt_tokens=lengths)
    logarithms = [math.log(n) for n in prompt_lengths(workload("W4", vocab_size=VOCAB_SIZE, open_loop=open_loop))]
    # Four standard errors of either statistic of 4000 normal draws.
    assert statistics.median(logarithms) == pytest.approx(math.log(200), abs=4 * 1.2533 * 0.5 / 4000**0.5)
    assert statistics.stdev(logarithms) == pytest.approx(0.5, abs=4 * 0.5 / 8000**0.5)


@pytest.mark.parametrize("seed", range(4))
def test_w4_arrives_at_its_rate_on_average(seed: int) -> None:
    shapes = workload("W4", vocab_size=VOCAB_SIZE, seed=seed, open_loop=MANY)
    # The last of n arrivals is a sum of n exponentials: mean n / rate, standard deviation sqrt(n) / rate.
    assert shapes[-1].arrival_s == pytest.approx(4000 / 5.0, abs=4 * 4000**0.5 / 5.0)


@pytest.mark.parametrize("seed", range(4))
def test_w4_arrivals_in_a_second_vary_as_much_as_their_mean(seed: int) -> None:
    shapes = workload("W4", vocab_size=VOCAB_SIZE, seed=seed, open_loop=MANY)
    seconds = int(shapes[-1].arrival_s)
    counts = [0] * (seconds + 1)
    for shape in shapes:
        counts[int(shape.arrival_s)] += 1
    # Index of dispersion of a Poisson process is 1, with a standard error of sqrt(2 / n) over n intervals.
    dispersion = statistics.variance(counts[:seconds]) / statistics.mean(counts[:seconds])
    assert dispersion == pytest.approx(1.0, abs=4 * (2 / seconds) ** 0.5)


@given(SEEDS, st.floats(0.01, 1e4))
def test_w4_arrivals_never_go_back(seed: int, rate_per_s: float) -> None:
    open_loop = OpenLoop(rate_per_s=rate_per_s, num_requests=30)
    arrivals_s = [shape.arrival_s for shape in workload("W4", vocab_size=VOCAB_SIZE, seed=seed, open_loop=open_loop)]
    assert arrivals_s == sorted(arrivals_s)
    assert arrivals_s[0] >= 0


def test_w4_asks_the_same_at_any_rate() -> None:
    slow, fast = (
        workload("W4", vocab_size=VOCAB_SIZE, open_loop=OpenLoop(rate_per_s=rate_per_s)) for rate_per_s in (0.5, 50.0)
    )
    assert [shape[:2] for shape in slow] == [shape[:2] for shape in fast]


def test_an_unknown_workload_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RequestError, match="'W9' is no workload; known: W1, W2, W3, W4"):
        workload("W9", vocab_size=VOCAB_SIZE)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate_per_s", [0.0, -1.0, math.inf, math.nan])
def test_a_rate_that_is_none_is_refused(rate_per_s: float) -> None:
    with pytest.raises(RequestError, match="a rate above 0"):
        OpenLoop(rate_per_s=rate_per_s)


@pytest.mark.parametrize(
    "lengths",
    [
        LengthDistribution(median=10, sigma=1.0, least=0, most=5),
        LengthDistribution(median=10, sigma=1.0, least=6, most=5),
        LengthDistribution(median=0, sigma=1.0, least=1, most=5),
        LengthDistribution(median=10, sigma=-1.0, least=1, most=5),
    ],
)
def test_lengths_that_cannot_be_drawn_are_refused(lengths: LengthDistribution) -> None:
    with pytest.raises(RequestError, match="output_tokens"):
        OpenLoop(output_tokens=lengths)
