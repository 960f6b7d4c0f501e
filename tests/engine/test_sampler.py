"""Tokens drawn from a vocabulary cut over ranks; the ranks are threads, their transfers real."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.sampler_ranks import SPLITS, VOCAB, decode, draw, each_rank
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from phalanx.comm import Communicator
from phalanx.engine import vocab_shard
from phalanx.engine.guide import mask_of
from phalanx.engine.messages import Sampling, TokenLogprobs
from phalanx.engine.sampler import Sampler
from phalanx.kernels import argmax_keys
from phalanx.parallel.split import Split

PROMPT = tuple(range(3, 40, 4))
SAMPLED = Sampling(temperature=1.0, num_prompt=len(PROMPT))
RULES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4, "history": PROMPT},
    "presence": {"presence_penalty": 1.5, "history": PROMPT},
    "frequency": {"frequency_penalty": -1.0, "history": PROMPT},
    "all penalties": {
        "repetition_penalty": 0.7,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "history": PROMPT,
    },
    "bias": {"logit_bias": ((0, 4.0), (499, 6.0), (500, 6.0), (640, 5.0), (999, 4.5))},
    "allowed": {"allowed": (1, 3, 499, 500, 650, 998)},
    "minimum": {"min_tokens": 3, "stop_tokens": tuple(range(0, VOCAB, 2))},
}


def seeded(one: Sampling, num_rows: int, first: int = 0) -> list[Sampling]:
    return [msgspec.structs.replace(one, seed=first + row) for row in range(num_rows)]


def some_logits(num_rows: int, seed: int) -> torch.Tensor:
    """Rounded to bfloat16, so that there are equals."""
    return (torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2).bfloat16().float()


@pytest.mark.parametrize("split", SPLITS)
def test_greedy_takes_the_largest_and_the_first_of_equals(split: Split) -> None:
    logits = torch.randn(3, VOCAB)
    logits[0, [900, 40, 700]] = 9.0
    logits[1, VOCAB - 1] = 9.0
    expected = [40, VOCAB - 1, int(logits[2].argmax())]
    assert draw(split, logits, [Sampling()] * 3) == expected

    def plainly(comm: Communicator, part: slice) -> list[list[int]]:
        sampler, own = Sampler(split, comm), logits[:, part].contiguous()
        drawn = sampler.likeliest(own), sampler.likeliest_by_keys(argmax_keys(own, part.start))
        return [draws.tokens.tolist() for draws in drawn]

    assert each_rank(split, plainly) == [[expected] * 2] * split.num_parts


def test_plain_is_who_wants_nothing_that_changes_the_likeliest_token_or_asks_for_more() -> None:
    changes: dict[str, Any] = {"temperature": 0.1, "logprobs": 0, "logit_bias": ((1, 2.0),), "allowed": ()}
    changes |= {"presence_penalty": 0.1, "frequency_penalty": -0.1, "repetition_penalty": 1.1, "stop_tokens": (2,)}
    others = {"seed", "top_k", "top_p", "min_p", "prompt_logprobs", "num_prompt", "history", "min_tokens"}
    assert {*changes, *others} == set(Sampling.__struct_fields__)
    assert Sampling(seed=3, top_k=4, top_p=0.5, min_p=0.1, prompt_logprobs=2, num_prompt=5).plain
    for name, value in changes.items():
        assert not Sampling(**{name: value}).plain, name


@pytest.mark.parametrize(
    "one",
    [
        Sampling(temperature=1),
        Sampling(temperature=0.5, min_p=0.05),
        Sampling(temperature=1, top_k=1),
        Sampling(temperature=2, top_k=30),
        Sampling(temperature=1, top_p=0.3),
        Sampling(temperature=3, top_p=0.999),
        Sampling(temperature=1, top_k=50, top_p=0.8, min_p=0.01),
    ],
)
def test_the_split_does_not_change_what_is_drawn(one: Sampling) -> None:
    logits, samplings = some_logits(16, 1), seeded(one, 16)
    expected = draw(SPLITS[0], logits, samplings)
    for split in SPLITS[1:]:
        assert draw(split, logits, samplings) == expected


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_the_split_does_not_change_what_rules_leave(rule: dict[str, Any]) -> None:
    steps = [some_logits(9, 7)] * 6  # the same, or few tokens would come twice
    kinds = [Sampling(), Sampling(temperature=0.8), Sampling(temperature=0.8, top_k=40, top_p=0.9)]
    samplings = [
        msgspec.structs.replace(kind, seed=seed, num_prompt=len(PROMPT), **rule) for kind in kinds for seed in range(3)
    ]
    expected, _ = decode(SPLITS[0], steps, samplings, [len(PROMPT)] * 9)
    plain = [msgspec.structs.replace(kind, seed=seed) for kind in kinds for seed in range(3)]
    assert expected != decode(SPLITS[0], steps, plain, [len(PROMPT)] * 9)[0]
    for split in SPLITS[1:]:
        assert decode(split, steps, samplings, [len(PROMPT)] * 9)[0] == expected


def test_neither_the_batch_nor_the_neighbours_change_what_is_drawn() -> None:
    samplings = [
        Sampling(),
        *seeded(SAMPLED, 2, first=1),
        Sampling(seed=3, temperature=1, top_k=5),
        Sampling(seed=4, temperature=1, top_p=0.9, logprobs=3),
        Sampling(seed=5, temperature=1, min_p=0.1),
        *(msgspec.structs.replace(SAMPLED, seed=6, **rule) for rule in RULES.values()),
        *(msgspec.structs.replace(SAMPLED, temperature=0, **rule) for rule in RULES.values()),
    ]
    steps = [some_logits(len(samplings), seed) for seed in range(4)]
    positions = [len(PROMPT)] * len(samplings)
    together, _ = decode(SPLITS[1], steps, samplings, positions)
    for row, sampling in enumerate(samplings):
        alone, _ = decode(SPLITS[1], [logits[row : row + 1] for logits in steps], [sampling], [len(PROMPT)])
        assert together[row] == alone[0]


def test_rows_taken_a_few_at_a_time_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [SAMPLED, Sampling(temperature=1, min_p=0.1), Sampling(temperature=1, top_p=0.9, logprobs=2)]
    ruled = [msgspec.structs.replace(SAMPLED, **RULES[name]) for name in ("all penalties", "allowed")]
    samplings = [sampling for kind in (*kinds, *ruled) for sampling in seeded(kind, 5)]
    steps = [some_logits(len(samplings), seed) for seed in range(2)]
    positions = list(range(30, 30 + len(samplings)))
    together = decode(SPLITS[1], steps, samplings, positions)
    monkeypatch.setattr(vocab_shard, "HOST_BLOCK", 2 * VOCAB)
    assert decode(SPLITS[1], steps, samplings, positions) == together


@pytest.mark.parametrize(
    ("one", "warpers"),
    [
        (Sampling(temperature=1), []),
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1, top_k=5), [TopKLogitsWarper(5)]),
        (Sampling(temperature=1, top_p=0.6), [TopPLogitsWarper(0.6)]),
        (Sampling(temperature=1, min_p=0.2), [MinPLogitsWarper(0.2)]),
        (
            Sampling(temperature=1.5, min_p=0.1, top_k=8, top_p=0.8),
            [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.1), TopKLogitsWarper(8), TopPLogitsWarper(0.8)],
        ),
    ],
)
def test_draws_follow_the_distribution_that_transformers_warps(one: Sampling, warpers: list[object]) -> None:
    """Frequencies over many seeds against the probabilities; seeds are fixed, so the outcome is too."""
    num_tokens, num_draws = 24, 6000
    logits = torch.randn(1, num_tokens, generator=torch.Generator().manual_seed(3)) * 1.5
    warped = LogitsProcessorList(warpers)(torch.zeros(1, 1, dtype=torch.int64), logits.clone())
    expected = warped.softmax(1)[0].double()
    drawn = draw(Split.even(num_tokens, 1), logits.expand(num_draws, -1), seeded(one, num_draws))
    counts = torch.bincount(torch.tensor(drawn), minlength=num_tokens).double()
    assert (counts[expected == 0] == 0).all()
    deviation = (counts / num_draws - expected).abs()
    assert (deviation <= 4.5 * (expected * (1 - expected) / num_draws).sqrt() + 1e-9).all()


def test_a_nucleus_wider_than_first_asked_for_is_still_whole() -> None:
    """A flat distribution: 90 % of the mass needs 900 of 1000 tokens, far more than the candidates first gathered."""
    logits = -torch.arange(VOCAB, dtype=torch.float32).expand(400, -1) * 1e-4
    drawn = draw(SPLITS[1], logits, seeded(Sampling(temperature=1, top_p=0.9), 400))
    kept = int((logits[0].double().softmax(0).cumsum(0) < 0.9).sum()) + 1
    assert max(drawn) < kept
    assert max(drawn) > kept - 50


@pytest.mark.parametrize("split", SPLITS)
def test_of_equal_logits_top_k_keeps_the_first(split: Split) -> None:
    """Beside a row that needs more candidates, too."""
    logits = torch.zeros(200, VOCAB)
    logits[:, 990] = 1
    samplings = [*seeded(Sampling(temperature=50, top_k=4), 199), Sampling(temperature=50, top_p=0.5)]
    assert set(draw(split, logits, samplings)[:-1]) == {990, 0, 1, 2}


def test_a_mask_narrower_than_top_k_is_kept() -> None:
    logits, mask = some_logits(50, 5), mask_of([17, 900], VOCAB)
    masks = {2 * row + 1: mask for row in range(50)}
    for kind in (Sampling(temperature=9, top_k=30), Sampling(temperature=9, top_p=0.99), Sampling(temperature=9)):
        assert set(draw(SPLITS[2], logits, seeded(kind, 50), masks=masks)) == {17, 900}


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
@pytest.mark.parametrize("split", SPLITS)
def test_a_sequence_taken_up_again_with_its_history_goes_on_alike(split: Split, cut: int) -> None:
    """As after preemption: its slot was another's, and it may get another slot."""
    steps = [some_logits(2, 8) * 2] * 8  # the same and sharp, or few tokens would come twice
    rules = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.9, "min_tokens": 5}
    one = msgspec.structs.replace(SAMPLED, history=PROMPT, stop_tokens=tuple(range(0, VOCAB, 3)), **rules)
    whole, _ = decode(split, steps, seeded(one, 2), [len(PROMPT)] * 2)

    def interrupted(comm: Communicator, part: slice) -> list[list[int]]:
        sampler = Sampler(split, comm)
        drawn: list[list[int]] = [[], []]
        slots = [4, 9]
        for step, logits in enumerate(steps):
            if step in (0, cut):
                sampler.admit(slots[0], Sampling(repetition_penalty=2.0, history=tuple(range(500))))
                slots = [slot + step for slot in slots]
                for row, slot in enumerate(slots):
                    again = msgspec.structs.replace(one, seed=row, history=(*PROMPT, *drawn[row]))
                    sampler.admit(slot, again)
            tokens = sampler.sample(logits[:, part].clone(), slots, [len(PROMPT) + step] * 2).tokens.tolist()
            for row, token in enumerate(tokens):
                drawn[row].append(token)
        return drawn

    assert each_rank(split, interrupted) == [whole] * split.num_parts


@pytest.mark.parametrize("split", SPLITS)
def test_logprobs_are_the_models_own(split: Split) -> None:
    """Whatever temperature and rules make of the logits."""
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(4))
    exact = logits.double().log_softmax(1)
    samplings = [
        Sampling(seed=1, temperature=1, logprobs=0),
        Sampling(seed=2, temperature=1),
        Sampling(seed=3, temperature=0.1, logprobs=5),
        Sampling(logit_bias=((800, 50.0),), repetition_penalty=2.0, history=tuple(range(VOCAB)), logprobs=2),
    ]
    tokens, [logprobs] = decode(split, [logits], samplings, [7] * 4)
    assert logprobs.keys() == {0, 2, 3}
    assert tokens[3] == [800]
    for row, found in logprobs.items():
        top = exact[row].topk(samplings[row].logprobs)
        assert found.token == tokens[row][0]
        assert found.logprob == pytest.approx(exact[row, found.token].item())
        assert [token for token, _ in found.top] == top.indices.tolist()
        assert [value for _, value in found.top] == pytest.approx(top.values.tolist())


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("num_top", [0, 3])
def test_logprobs_of_a_prompt_are_those_of_the_tokens_given(split: Split, num_top: int) -> None:
    logits, following = torch.randn(30, VOCAB), [row * 34 % VOCAB for row in range(30)]

    def work(comm: Communicator, part: slice) -> tuple[TokenLogprobs, ...]:
        return Sampler(split, comm).prompt_logprobs(logits[:, part].clone(), following, num_top).read()

    exact = logits.double().log_softmax(1)
    for found in each_rank(split, work):
        assert [each.token for each in found] == following
        assert [each.logprob for each in found] == pytest.approx(exact[range(30), following].tolist())
        assert [[token for token, _ in each.top] for each in found] == exact.topk(num_top).indices.tolist()
        assert [value for each in found for _, value in each.top] == pytest.approx(
            exact.topk(num_top).values.flatten().tolist()
        )


@settings(max_examples=40)
@given(st.data())
def test_candidates_are_in_order_of_value_then_token(data: st.DataObject) -> None:
    """Few distinct values, so that the last place is often shared."""
    values = data.draw(st.lists(st.sampled_from((0.0, 1.0, 2.0, -1.0)), min_size=3, max_size=40))
    bounds = sorted(data.draw(st.sets(st.integers(1, len(values) - 1), max_size=2)))
    num_top = data.draw(st.integers(1, len(values)))
    split = Split.explicit(len(values), [0, *bounds, len(values)])
    tokens, [logprobs] = decode(split, [torch.tensor([values])], [Sampling(logprobs=num_top)], [1])
    expected = sorted(range(len(values)), key=lambda token: (-values[token], token))[:num_top]
    assert [token for token, _ in logprobs[0].top] == expected
    assert tokens == [[expected[0]]]
