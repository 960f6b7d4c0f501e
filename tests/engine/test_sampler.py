"""Tokens drawn from a vocabulary cut over ranks; the ranks are threads, their transfers real."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._C._distributed_c10d import HashStore
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phalanx.comm import create_communicator
from phalanx.engine.messages import NewSequence, SampledToken
from phalanx.engine.sampler import Sampler
from phalanx.parallel.split import Split

VOCAB = 1000
SPLITS = [Split.even(VOCAB, 1), Split.even(VOCAB, 2), Split.weighted(VOCAB, (5, 1, 2), granule=16)]


def request(
    seed: int = 0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, logprobs: int = -1
) -> NewSequence:
    return NewSequence(0, seed, temperature, top_k, top_p, min_p, logprobs)


def draw(
    split: Split, logits: torch.Tensor, requests: Sequence[NewSequence], positions: Sequence[int] | None = None
) -> list[SampledToken]:
    """Draws on every rank of the split and returns what all of them agree on."""
    store = HashStore()
    places = positions or [7] * len(requests)

    def rank(number: int) -> list[SampledToken]:
        with create_communicator("auto", rank=number, size=split.num_parts, rendezvous=store, timeout_s=20) as comm:
            return Sampler(split, comm).sample(logits[:, split[number].slice], requests, places)

    with ThreadPoolExecutor(split.num_parts) as pool:
        results = list(pool.map(rank, range(split.num_parts)))
    assert all(result == results[0] for result in results)
    return results[0]


def tokens(drawn: Sequence[SampledToken]) -> list[int]:
    return [each.token for each in drawn]


@pytest.mark.parametrize("split", SPLITS)
def test_greedy_takes_the_largest_and_the_first_of_equals(split: Split) -> None:
    logits = torch.randn(3, VOCAB)
    logits[0, [900, 40, 700]] = 9.0
    logits[1, VOCAB - 1] = 9.0
    assert tokens(draw(split, logits, [request(temperature=0)] * 3)) == [40, VOCAB - 1, int(logits[2].argmax())]


@pytest.mark.parametrize(
    "one",
    [
        request(),
        request(temperature=0.5, min_p=0.05),
        request(top_k=1),
        request(top_k=30, temperature=2.0),
        request(top_p=0.3),
        request(top_p=0.999, temperature=3.0),
        request(top_k=50, top_p=0.8, min_p=0.01),
    ],
)
def test_the_split_does_not_change_what_is_drawn(one: NewSequence) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(16, VOCAB, generator=generator) * 2).bfloat16().float()  # bfloat16, so that there are equals
    requests = [one._replace(seed=seed) for seed in range(16)]
    expected = draw(SPLITS[0], logits, requests)
    for split in SPLITS[1:]:
        assert draw(split, logits, requests) == expected


def test_neither_the_batch_nor_the_neighbours_change_what_is_drawn() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    requests = [request(1), request(2, top_k=5), request(3, temperature=0), request(4, top_p=0.9, logprobs=3)]
    together = draw(SPLITS[1], logits, requests, [5, 6, 7, 8])
    alone = [draw(SPLITS[1], logits[[row]], [requests[row]], [5 + row])[0] for row in range(4)]
    assert tokens(together) == tokens(alone)


@pytest.mark.parametrize(
    ("one", "warpers"),
    [
        (request(), []),
        (request(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (request(top_k=5), [TopKLogitsWarper(5)]),
        (request(top_p=0.6), [TopPLogitsWarper(0.6)]),
        (request(min_p=0.2), [MinPLogitsWarper(0.2)]),
        (
            request(temperature=1.5, min_p=0.1, top_k=8, top_p=0.8),
            [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.1), TopKLogitsWarper(8), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_draws_follow_the_distribution_that_transformers_warps(one: NewSequence, warpers: list[object]) -> None:
    """Frequencies over many seeds against the probabilities; seeds are fixed, so the outcome is too."""
    num_tokens, num_draws = 24, 6000
    logits = torch.randn(1, num_tokens, generator=torch.Generator().manual_seed(3)) * 1.5
    warped = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.int64), logits.clone())
    expected = warped.softmax(1)[0].double()
    split = Split.even(num_tokens, 1)
    drawn = draw(split, logits.expand(num_draws, -1), [one._replace(seed=seed) for seed in range(num_draws)])
    counts = torch.bincount(torch.tensor(tokens(drawn)), minlength=num_tokens).double()
    assert (counts[expected == 0] == 0).all()
    deviation = (counts / num_draws - expected).abs()
    assert (deviation <= 4.5 * (expected * (1 - expected) / num_draws).sqrt() + 1e-9).all()


@pytest.mark.parametrize("split", SPLITS)
def test_logprobs_are_the_models_own(split: Split) -> None:
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(4))
    exact = logits.double().log_softmax(1)
    drawn = draw(split, logits, [request(1, logprobs=0), request(2), request(3, temperature=0.1, logprobs=5)])
    assert drawn[0].logprob == pytest.approx(exact[0, drawn[0].token].item())
    assert drawn[0].top == ()
    assert drawn[1].logprob is None
    top = exact[2].topk(5)
    assert [token for token, _ in drawn[2].top] == top.indices.tolist()
    assert [value for _, value in drawn[2].top] == pytest.approx(top.values.tolist())


def test_a_nucleus_wider_than_first_asked_for_is_still_whole() -> None:
    """A flat distribution: 90 % of the mass needs 900 of 1000 tokens, far more than the candidates first gathered."""
    requests = [request(seed, top_p=0.9) for seed in range(400)]
    logits = -torch.arange(VOCAB, dtype=torch.float32).expand(400, -1) * 1e-4
    drawn = tokens(draw(SPLITS[1], logits, requests))
    kept = int((logits[0].double().softmax(0).cumsum(0) < 0.9).sum()) + 1
    assert max(drawn) < kept
    assert max(drawn) > kept - 50
