"""What is decided of a step from rates; and that a product in chunks is the product."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rank_threads import Join, run_ranks

from phalanx.parallel.layers import RowParallelLinear
from phalanx.parallel.overlap import (
    PIECES,
    WORTH,
    Overlap,
    StageWork,
    Way,
    choose_way,
    chunks_s,
    parts_s,
    serial_times,
)
from phalanx.parallel.rates import LEAST_TOKENS, Rates
from phalanx.parallel.stream import reduce_in_chunks

# A token of a product of 1000 x 1000 takes 2 ms, and so does its sum in bf16.
EVEN = Rates(flops_per_s=1e9, latency_s=1e-6, bytes_per_s=1e6)
# Blocks of three such products, of which one is row-parallel.
WORK = StageWork(
    num_layers=8,
    attention=3_000_000,
    ffn=3_000_000,
    hidden=1000,
    attention_inputs=1000,
    ffn_inputs=1000,
    itemsize=2,
)

work = st.builds(
    StageWork,
    num_layers=st.integers(1, 6),
    attention=st.integers(10**6, 10**8),
    ffn=st.integers(10**6, 10**8),
    hidden=st.integers(1, 900),
    attention_inputs=st.integers(1, 900),
    ffn_inputs=st.integers(1, 900),
    itemsize=st.sampled_from([2, 4]),
)
rates = st.builds(
    Rates,
    flops_per_s=st.floats(1e8, 1e13),
    latency_s=st.floats(1e-7, 1.0),
    bytes_per_s=st.floats(1e5, 1e12),
    contention=st.floats(0, 1),
    weights_per_s=st.floats(1e6, 1e12),
)


def test_parts_hide_sums_behind_whole_blocks_and_chunks_behind_one_product() -> None:
    rates = EVEN._replace(bytes_per_s=1e6 / 3)  # sums take as long as blocks
    compute_s, transfer_s, serial_s = serial_times(1024, WORK, rates)
    assert compute_s == pytest.approx(transfer_s, rel=1e-3)
    # What cannot be hidden is the last of 32 sums.
    assert parts_s(1024, WORK, rates, 2) == pytest.approx(compute_s + transfer_s / 32, rel=1e-3)
    assert chunks_s(1024, WORK, rates, 8) == pytest.approx(serial_s - compute_s / 3 * (1 - 1 / 8), rel=1e-3)
    chosen = choose_way(1024, WORK, rates, None)
    assert chosen.name == "parts"
    assert " take " in chosen.reason


def test_of_unlike_blocks_more_parts_hide_more() -> None:
    uneven = WORK._replace(attention=1_000_000, ffn=5_000_000)
    rates = EVEN._replace(bytes_per_s=1e6 / 3)
    # Behind one half's attention goes a third of the other's sum: two thirds of each of 2 in a layer are waited for.
    compute_s, transfer_s, _ = serial_times(1024, uneven, rates)
    halves_s, eighths_s = (parts_s(1024, uneven, rates, parts) for parts in (2, 8))
    assert halves_s > 1.2 * max(compute_s, transfer_s)
    assert eighths_s < 1.1 * max(compute_s, transfer_s)
    assert choose_way(1024, uneven, rates, None).num_pieces == 8


@pytest.mark.parametrize(
    "rates",
    [
        EVEN._replace(bytes_per_s=1e9),  # nothing to hide
        EVEN._replace(flops_per_s=1e12),  # nothing to hide it behind
        EVEN._replace(latency_s=10.0),  # each part pays for it
        EVEN._replace(weights_per_s=1000.0),  # each part reads all weights anew
        EVEN._replace(contention=1.0),  # cores that send do not compute
    ],
)
def test_what_gains_too_little_is_left_as_it_is(rates: Rates) -> None:
    chosen = choose_way(1024, WORK, rates, None)
    assert chosen.name == "none"
    assert "too little" in chosen.reason


@given(st.integers(2 * LEAST_TOKENS, 4096), work, rates)
def test_what_is_chosen_is_predicted_to_gain_and_nothing_beats_the_longer_of_the_two(
    num_tokens: int, work: StageWork, rates: Rates
) -> None:
    chosen = choose_way(num_tokens, work, rates, None)
    compute_s, _, serial_s = serial_times(num_tokens, work, rates)
    predicted = {
        (name, pieces): took_s(num_tokens, work, rates, pieces)
        for name, took_s in (("chunks", chunks_s), ("parts", parts_s))
        for pieces in PIECES
        if num_tokens // pieces >= LEAST_TOKENS
    }
    slack = 1 + 1e-9
    assert min(predicted.values()) * slack >= compute_s
    if chosen.name != "none":
        assert predicted[chosen.name, chosen.num_pieces] <= WORTH * serial_s * slack
        assert predicted[chosen.name, chosen.num_pieces] == min(predicted.values())


def test_norms_of_ones_own_tokens_are_taken_where_they_were_faster_and_nothing_hides_more() -> None:
    slow_to_send = EVEN._replace(bytes_per_s=1e9)
    assert choose_way(1024, WORK, slow_to_send, 512).name == "sequence"
    assert choose_way(1024, WORK, None, 512).name == "sequence"
    assert choose_way(500, WORK, None, 512).name == "none"
    assert choose_way(1024, WORK, None, None).name == "none"
    assert choose_way(1024, WORK, EVEN, 512).name == "parts"


def test_small_steps_and_what_was_not_measured_are_left_as_they_are() -> None:
    overlap = Overlap("auto", WORK, EVEN)
    assert overlap.way(2 * LEAST_TOKENS - 1).name == "none"
    assert overlap.way(1024).name == "parts"
    assert Overlap().way(1024).name == "none"
    assert Overlap("chunks").way(1024).name == "chunks"
    assert Overlap("chunks").way(2 * LEAST_TOKENS - 1).name == "none"


def test_a_product_in_chunks_is_the_product() -> None:
    num_tokens, num_inputs, num_outputs = 200, 24, 16
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randint(-8, 9, shape, generator=generator).float()
        for shape in ((num_tokens, num_inputs), (num_outputs, num_inputs))
    )

    def rank(number: int, join: Join) -> torch.Tensor:
        part = slice(12 * number, 12 * number + 12)
        comm = join("stage", number, 2)
        return reduce_in_chunks(
            RowParallelLinear(comm, weight=weight[:, part].contiguous()), x[:, part].contiguous(), 7
        )

    for found in run_ranks(2, rank):
        assert torch.equal(found, x @ weight.T)


@pytest.mark.parametrize("backend", ["shm", "gloo", "hierarchical"])
def test_ranks_of_unlike_shares_decide_alike(backend: str) -> None:
    """Or one would be in a call that the other never makes."""

    def rank(number: int, join: Join) -> list[Way]:
        comm = join("stage", number, 2)
        assert comm.backend == backend
        overlap = Overlap()
        own = WORK._replace(attention=1_000_000 * (1 + 4 * number), ffn_inputs=500 * (1 + number))
        overlap.measure(comm, own, torch.zeros(16, 12 * (1 + 3 * number)), torch.ones(16), 512)
        return [overlap.way(num_tokens) for num_tokens in range(1, 513)]

    one, other = run_ranks(2, rank, backend=backend)
    assert one == other
    assert any("same cores" in way.reason for way in one) == (backend == "shm")


def test_steps_without_anything_to_hide_are_told_so() -> None:
    def rank(number: int, join: Join) -> str:
        return Overlap().measure(join("stage", number, 2), WORK, torch.zeros(16, 12), torch.ones(16), 127)

    assert run_ranks(2, rank) == ["none at 127 tokens: steps of fewer than 128 tokens have nothing to hide behind"] * 2


def test_rates_follow_the_roofline() -> None:
    rates = Rates(flops_per_s=100.0, latency_s=0.0, bytes_per_s=1.0, weights_per_s=1000.0)
    assert rates.compute_s(1, 1000) == pytest.approx(max(20.0, 1.0))
    assert rates._replace(weights_per_s=10.0).compute_s(1, 1000) == pytest.approx(100.0)
    assert EVEN.weights_per_s == math.inf
