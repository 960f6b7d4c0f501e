"""When a product is reduced in chunks, and that it comes out the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.rank_threads import Join, run_ranks

from phalanx.parallel.layers import RowParallelLinear
from phalanx.parallel.overlap import LEAST_TOKENS, WORTH, Overlap, Rates, choose_cut

EVEN = Rates(flops_per_s=1e9, latency_s=1e-6, bytes_per_s=1e6)  # 1000 x 1000 in bf16: 2 ms of each for a token


def test_a_transfer_as_long_as_its_product_is_hidden_behind_it() -> None:
    chosen = choose_cut(1024, 1000, 1000, 2, EVEN)
    assert chosen.num_chunks == 8
    assert "2048.00 ms of product and 2048.00 ms of transfer" in chosen.reason


@pytest.mark.parametrize(
    "rates",
    [
        EVEN._replace(bytes_per_s=1e9),  # nothing to hide
        EVEN._replace(flops_per_s=1e12),  # nothing to hide it behind
        EVEN._replace(latency_s=10.0),  # each chunk pays for it
    ],
)
def test_what_gains_too_little_is_left_whole(rates: Rates) -> None:
    chosen = choose_cut(1024, 1000, 1000, 2, rates)
    assert chosen.num_chunks == 1
    assert "too little" in chosen.reason


@given(
    st.integers(1, 4096),
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.floats(1e8, 1e13),
    st.floats(1e-7, 1.0),
    st.floats(1e5, 1e12),
)
def test_a_cut_is_predicted_to_gain_and_leaves_chunks_of_some_size(
    num_tokens: int, num_outputs: int, num_inputs: int, flops: float, latency_s: float, bandwidth: float
) -> None:
    chosen = choose_cut(num_tokens, num_outputs, num_inputs, 2, Rates(flops, latency_s, bandwidth))
    if chosen.num_chunks > 1:
        compute_s = 2 * num_tokens * num_outputs * num_inputs / flops
        transfer_s = 2 * num_tokens * num_outputs / bandwidth
        took_s = max(compute_s, transfer_s) + min(compute_s, transfer_s) / chosen.num_chunks
        assert took_s + chosen.num_chunks * latency_s <= WORTH * (compute_s + transfer_s + latency_s) * (1 + 1e-9)
        assert num_tokens // chosen.num_chunks >= LEAST_TOKENS


def test_what_is_hidden_and_lost_again_does_not_count() -> None:
    assert choose_cut(1024, 1000, 1000, 2, EVEN._replace(contention=0.3)).num_chunks == 8
    lost = choose_cut(1024, 1000, 1000, 2, EVEN._replace(contention=0.9))
    assert lost.num_chunks == 1
    assert "90% of what is hidden lost again" in lost.reason


def test_steps_of_few_tokens_and_ranks_that_have_not_measured_cut_nothing() -> None:
    overlap, weight = Overlap(), torch.zeros(1000, 1000, dtype=torch.bfloat16)
    assert overlap.cut(1024, weight) == 1
    overlap.rates = EVEN
    assert overlap.cut(2 * LEAST_TOKENS - 1, weight) == 1
    assert overlap.cut(1024, weight) == 8


@pytest.mark.parametrize("biased", [False, True])
def test_a_product_in_chunks_is_the_product(biased: bool) -> None:
    num_tokens, num_inputs, num_outputs = 200, 24, 16
    generator = torch.Generator().manual_seed(0)
    x, weight, residual, norm, bias = (
        torch.randint(-8, 9, shape, generator=generator).float()
        for shape in (
            (num_tokens, num_inputs),
            (num_outputs, num_inputs),
            (num_tokens, num_outputs),
            (num_outputs,),
            (num_outputs,),
        )
    )

    def rank(number: int, join: Join) -> list[torch.Tensor]:
        part = slice(12 * number, 12 * number + 12)
        comm = join("stage", number, 2)
        found = []
        for rates in (None, Rates(flops_per_s=1e3, latency_s=1e-9, bytes_per_s=1e3)):
            overlap = Overlap()
            overlap.rates = rates
            layer = RowParallelLinear(weight[:, part].contiguous(), comm, bias if biased else None, overlap)
            mine = x[:, part].contiguous()
            found += [layer(mine), *layer.add_and_norm(mine, residual, norm, 1e-5)]
            found.append(torch.tensor(overlap.cut(num_tokens, layer.weight)))
        return found

    for found in run_ranks(2, rank):
        whole, chunked = found[:4], found[4:]
        assert (int(whole[3]), int(chunked[3]) > 1) == (1, True)
        assert torch.equal(whole[0], chunked[0])
        assert torch.equal(whole[2], chunked[2])
        assert torch.allclose(whole[1], chunked[1], rtol=1e-6)
        exact = x @ weight.T + (bias if biased else 0)
        assert torch.equal(chunked[0], exact)


def test_rates_are_measured_only_where_transfers_go_on_by_themselves() -> None:
    def rank(number: int, join: Join) -> tuple[str, Rates | None]:
        comm = join("stage", number, 2)
        overlap = Overlap()
        return overlap.measure(comm, torch.zeros(16, 12), 128), overlap.rates

    told = run_ranks(2, rank)
    assert told[0] == told[1]
    words, rates = told[0]
    assert (rates is None) == words.startswith("none: transfers of")
