"""Logits as rules leave them, on every rank's shard, against transformers and formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.sampler_ranks import SPLITS, VOCAB, each_rank
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from phalanx.comm import Communicator
from phalanx.engine.guide import mask_of
from phalanx.engine.logit_rules import LogitRules
from phalanx.engine.messages import Sampling
from phalanx.engine.vocab_shard import VocabShard
from phalanx.parallel.split import Split

HISTORY = (5, 5, 5, 614, 612, 613, 999, 0, 5, 612, 612)
NUM_PROMPT = 4

pytestmark = pytest.mark.parametrize("split", SPLITS)


def ruled(
    split: Split,
    logits: torch.Tensor,
    samplings: Sequence[Sampling],
    positions: Sequence[int] | None = None,
    masks: Mapping[int, bytes] = {},
    then: Sequence[int] = (),
) -> torch.Tensor:
    """The logits [B, VOCAB] after the rules of all ranks. then: tokens that were drawn in every row before."""
    slots = list(range(len(samplings)))

    def work(comm: Communicator, part: slice) -> torch.Tensor:
        rules = LogitRules(VocabShard(split, comm), comm.device)
        for slot, sampling in zip(slots, samplings, strict=True):
            rules.admit(slot, sampling)
        for token in then:
            rules.record(slots, torch.full((len(slots),), token))
        own = logits[:, part].clone()
        rules.apply(own, slots, positions or [50] * len(slots), masks)
        return own

    return torch.cat(each_rank(split, work), 1)


def plain(num_rows: int = 1) -> torch.Tensor:
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(6))


def occurrences(tokens: Sequence[int]) -> torch.Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=VOCAB).double()


@pytest.mark.parametrize("penalty", [0.5, 1.3, 100.0])
def test_repetition_penalty_is_that_of_transformers(split: Split, penalty: float) -> None:
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([HISTORY]), plain())
    sampling = Sampling(repetition_penalty=penalty, history=HISTORY, num_prompt=NUM_PROMPT)
    assert torch.equal(ruled(split, plain(), [sampling]), expected)


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (-2.0, 2.0)])
def test_presence_and_frequency_count_the_output_only(split: Split, presence: float, frequency: float) -> None:
    count = occurrences(HISTORY[NUM_PROMPT:])
    expected = plain().double() - frequency * count - presence * (count > 0)
    sampling = Sampling(presence_penalty=presence, frequency_penalty=frequency, history=HISTORY, num_prompt=NUM_PROMPT)
    torch.testing.assert_close(ruled(split, plain(), [sampling]).double(), expected, rtol=0, atol=1e-6)


def test_biases_are_those_of_transformers(split: Split) -> None:
    biases = ((0, -100.0), (612, 2.5), (613, 100.0), (999, -0.25))
    processor = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases])
    expected = processor(torch.tensor([HISTORY]), plain())
    assert torch.equal(ruled(split, plain(), [Sampling(logit_bias=biases)]), expected)


@pytest.mark.parametrize("num_drawn", [0, 1, 2, 3, 4])
def test_stop_tokens_wait_for_the_minimum_as_in_transformers(split: Split, num_drawn: int) -> None:
    processor = MinNewTokensLengthLogitsProcessor(NUM_PROMPT, 3, [0, 613, 999])
    expected = processor(torch.zeros(1, NUM_PROMPT + num_drawn, dtype=torch.int64), plain())
    sampling = Sampling(min_tokens=3, stop_tokens=(0, 613, 999), num_prompt=NUM_PROMPT)
    assert torch.equal(ruled(split, plain(), [sampling], [NUM_PROMPT + num_drawn]), expected)


def test_penalties_come_before_biases_and_both_before_what_is_ruled_out(split: Split) -> None:
    biases = ((5, 3.0), (612, 90.0))
    history = torch.tensor([HISTORY])
    expected = RepetitionPenaltyLogitsProcessor(2.0)(history, plain())
    expected -= 0.5 * (occurrences(HISTORY[NUM_PROMPT:]) > 0)
    expected = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases])(history, expected.float())
    expected[0, [token for token in range(VOCAB) if token not in (5, 7, 999)]] = -math.inf
    sampling = Sampling(
        repetition_penalty=2.0,
        presence_penalty=0.5,
        history=HISTORY,
        num_prompt=NUM_PROMPT,
        logit_bias=biases,
        allowed=(5, 7, 999),
    )
    torch.testing.assert_close(ruled(split, plain(), [sampling]), expected, rtol=0, atol=1e-6)


def left(logits: torch.Tensor) -> list[list[int]]:
    """The tokens that may still be drawn."""
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


def test_allowed_tokens_and_the_mask_of_a_step_both_hold(split: Split) -> None:
    masks = {0: mask_of([1, 613, 700], VOCAB), 1: mask_of([611, 612, 800], VOCAB)}
    samplings = [Sampling(), Sampling(allowed=(3, 612, 800, 999)), Sampling(allowed=(0, 614))]
    assert left(ruled(split, plain(3), samplings, masks=masks)) == [[1, 613, 700], [612, 800], [0, 614]]


def test_a_mask_may_end_before_the_vocabulary_or_after_it(split: Split) -> None:
    masks = {0: mask_of([2, 620], VOCAB)[: 621 // 8 + 1], 1: mask_of([998], VOCAB) + b"\xff"}
    assert left(ruled(split, plain(2), [Sampling()] * 2, masks=masks)) == [[2, 620], [998]]


def test_the_minimum_holds_under_a_mask_unless_only_stop_tokens_are_left(split: Split) -> None:
    sampling = Sampling(min_tokens=3, stop_tokens=(0, 999))
    masks = {0: mask_of([0, 7, 999], VOCAB), 1: mask_of([999], VOCAB)}
    samplings = [sampling, sampling, msgspec.structs.replace(sampling, allowed=(0, 5))]
    assert left(ruled(split, plain(3), samplings, [2] * 3, masks)) == [[7], [999], [5]]


def test_the_minimum_gives_way_where_every_token_is_a_stop_token(split: Split) -> None:
    sampling = Sampling(min_tokens=3, stop_tokens=tuple(range(VOCAB)))
    assert torch.equal(ruled(split, plain(), [sampling], [0]), plain())


@pytest.mark.parametrize("mask", [b"", mask_of([8], VOCAB), bytes(125) + b"\xff"])
def test_a_mask_that_leaves_nothing_is_an_error_on_every_rank(split: Split, mask: bytes) -> None:
    def work(comm: Communicator, part: slice) -> str:
        rules = LogitRules(VocabShard(split, comm), comm.device)
        rules.admit(4, Sampling(allowed=(3, 5)))
        with pytest.raises(ValueError, match="slot 4: none of the 1000 tokens may be drawn for position 9") as error:
            rules.apply(plain()[:, part].clone(), [4], [9], {4: mask})
        return str(error.value)

    assert len(set(each_rank(split, work))) == 1


def test_a_slot_taken_anew_forgets_what_held_it(split: Split) -> None:
    def work(comm: Communicator, part: slice) -> bool:
        rules = LogitRules(VocabShard(split, comm), comm.device)
        everything = Sampling(
            repetition_penalty=2.0,
            history=HISTORY,
            logit_bias=((5, 1.0),),
            allowed=(5, 6),
            stop_tokens=(7,),
            min_tokens=99,
        )
        rules.admit(2, everything)
        rules.admit(2, Sampling())
        rules.record([2], torch.tensor([8]))
        own = plain()[:, part].clone()
        rules.apply(own, [2], [5], {})
        return torch.equal(own, plain()[:, part]) and not rules.concern([2])

    assert all(each_rank(split, work))


@settings(max_examples=15)
@given(
    history=st.lists(st.integers(0, VOCAB - 1) | st.sampled_from((5, 612, 613)), max_size=20),
    num_drawn=st.integers(0, 20),
    num_prompt=st.integers(0, 20),
)
def test_tokens_drawn_count_like_tokens_of_the_history(
    split: Split, history: list[int], num_drawn: int, num_prompt: int
) -> None:
    known = history[: max(len(history) - num_drawn, 0)]
    num_prompt = min(num_prompt, len(known))
    one = Sampling(repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.2, num_prompt=num_prompt)
    expected = ruled(split, plain(), [msgspec.structs.replace(one, history=tuple(history))])
    found = ruled(split, plain(), [msgspec.structs.replace(one, history=tuple(known))], then=history[len(known) :])
    assert torch.equal(found, expected)


def test_many_penalised_slots_come_and_go_without_touching_each_other(split: Split) -> None:
    def work(comm: Communicator, part: slice) -> torch.Tensor:
        rules = LogitRules(VocabShard(split, comm), comm.device)
        for turn in range(3):
            for slot in range(7):
                penalised = (slot + turn) % 2 == 0
                history = tuple(range(slot * 100, slot * 100 + 30 + turn))
                rules.admit(slot, Sampling(presence_penalty=float(penalised), history=history))
        own = torch.zeros(7, part.stop - part.start)
        rules.apply(own, list(range(7)), [40] * 7, {})
        return own

    expected = torch.zeros(7, VOCAB)
    for slot in range(0, 7, 2):
        expected[slot, slot * 100 : slot * 100 + 32] = -1
    assert torch.equal(torch.cat(each_rank(split, work), 1), expected)
