"""Parameters of a request: what is refused, and what of them goes to the ranks."""

from __future__ import annotations

import math
import pickle
from functools import partial
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.engine.guide import ChoiceGuide
from phalanx.engine.messages import Sampling
from phalanx.engine.sampling_params import (
    MAX_LOGIT_BIAS,
    SamplingParams,
    check_tokens,
    completion_seed,
    sampling_for,
)
from phalanx.errors import RequestError

GUIDE = partial(ChoiceGuide, ((5, 6),), (2,), 50)
VOCAB = 50


def wire(params: SamplingParams, stop_tokens: tuple[int, ...] = (2,)) -> Sampling:
    return sampling_for(params, seed=9, prompt=[7, 8, 7], stop_tokens=stop_tokens, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", (0, 129, 1.0, True, None)),
        ("temperature", (1e-9, 101, math.nan, True)),
        ("presence_penalty", (-2.1, 2.1, math.nan, "1", None)),
        ("frequency_penalty", (-2.1, 2.1, math.nan, "1", None)),
        ("repetition_penalty", (0, -1.0, 101, math.inf, None)),
        (
            "logit_bias",
            (5, None, "5", {5: 101}, {5: math.nan}, {"5": 1}, {5: "1"}, [(5, 1), (5, 2)], [(5,)], {True: 1}),
        ),
        ("logit_bias", (dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0),)),
        ("allowed_token_ids", ((), 5, "5", (1.5,), (True,))),
        ("min_tokens", (-1, 17, 1.5, None)),
        ("prompt_logprobs", (-1, 21, 1.5, True)),
        ("stop_token_ids", (None, (1.5,), (True,))),
        ("guide", ("json", 5)),
    ],
)
def test_what_is_out_of_range_is_refused_by_name(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} is .*; allowed: "):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", (1, 128)),
        ("temperature", (0, 0.0, 1e-6, 100)),
        ("presence_penalty", (-2, 2.0)),
        ("frequency_penalty", (-2.0, 2)),
        ("repetition_penalty", (0.01, 100)),
        ("logit_bias", ({}, {5: -100, 6: 100}, [(5, 1.5)], dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0))),
        ("allowed_token_ids", (None, (0,), [5, 6])),
        ("min_tokens", (0, 16)),
        ("prompt_logprobs", (None, 0, 20)),
        ("guide", (None, GUIDE)),
    ],
)
def test_what_is_in_range_is_taken(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        SamplingParams(**{name: value})


def test_a_long_value_does_not_flood_the_message() -> None:
    with pytest.raises(RequestError) as error:
        SamplingParams(logit_bias=dict.fromkeys(range(5000), 1.0))
    assert len(str(error.value)) < 300


def test_a_guide_and_allowed_tokens_are_refused_together() -> None:
    with pytest.raises(RequestError, match=r"guide is .*; allowed: None beside allowed_token_ids"):
        SamplingParams(guide=GUIDE, allowed_token_ids=(5,))


def test_parameters_can_be_sent_to_another_process_and_used_as_keys() -> None:
    params = SamplingParams(logit_bias={6: 2.0, 5: 1.0}, allowed_token_ids=[5, 6], stop=["x"])  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(params)) == params
    assert {params: 1}[SamplingParams(logit_bias={5: 1.0, 6: 2.0}, allowed_token_ids=(5, 6), stop=("x",))] == 1


@pytest.mark.parametrize("name", ["logit_bias", "allowed_token_ids", "stop_token_ids"])
@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_past_the_vocabulary_is_refused_by_name(name: str, token: int) -> None:
    value: Any = {token: 1.0, 3: 1.0} if name == "logit_bias" else (3, token)
    with pytest.raises(RequestError, match=f"{name} names token {token}, .*; allowed: 0 to 49"):
        check_tokens(SamplingParams(**{name: value}), VOCAB)


def test_tokens_of_the_vocabulary_pass() -> None:
    check_tokens(SamplingParams(logit_bias={0: 1.0}, allowed_token_ids=(49,), stop_token_ids=(0, 49)), VOCAB)


def test_plain_parameters_take_the_least_to_send() -> None:
    assert wire(SamplingParams()) == Sampling(seed=9, num_prompt=3)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_history_goes_where_a_penalty_needs_it(name: str) -> None:
    penalised = SamplingParams(**{name: 0.5})  # type: ignore[arg-type]
    assert wire(penalised).history == (7, 8, 7)


def test_stop_tokens_go_where_a_minimum_needs_them() -> None:
    sampling = wire(SamplingParams(min_tokens=3), stop_tokens=(2, 40, VOCAB, -1))
    assert (sampling.stop_tokens, sampling.min_tokens) == ((2, 40), 3)


@pytest.mark.parametrize(("top_k", "sent"), [(0, 0), (49, 49), (50, 0), (10**30, 0)])
def test_top_k_of_the_whole_vocabulary_is_none(top_k: int, sent: int) -> None:
    assert wire(SamplingParams(top_k=top_k)).top_k == sent


def test_what_is_sent_arrives_as_it_was() -> None:
    params = SamplingParams(
        temperature=1,
        top_p=0.5,
        min_p=0.1,
        logprobs=0,
        prompt_logprobs=2,
        repetition_penalty=1.5,
        logit_bias={5: 3},
        allowed_token_ids=(5, 6),
        min_tokens=1,
    )
    sampling = wire(params)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=Sampling) == sampling
    assert (sampling.logprobs, sampling.prompt_logprobs, sampling.logit_bias) == (0, 2, ((5, 3),))


@given(st.integers(-(2**63), 2**63 - 1))
def test_completions_of_a_request_have_seeds_of_their_own(seed: int) -> None:
    seeds = [completion_seed(seed, index) for index in range(128)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 128
    assert all(-(2**63) <= each < 2**63 for each in seeds)
