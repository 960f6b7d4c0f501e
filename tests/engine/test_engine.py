"""Requests through the engine: text, stops, limits. The ranks are a script; the tokens are bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from phalanx.engine.engine import Engine
from phalanx.engine.messages import SampledToken, StepPlan, StepResult
from phalanx.engine.request import Delta, RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.scheduler import Limits
from phalanx.errors import RequestError
from phalanx.models.tokenizer import Tokenizer, byte_alphabet

EOS = 256


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then an end-of-text token."""
    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, source="test", eos_token_ids=(EOS,), eos_token="<end>")


class Script:
    """Ranks that draw what `draw(sequence, position)` says."""

    def __init__(self, draw: Callable[[int, int], int]) -> None:
        self._draw = draw
        self._results: deque[StepResult] = deque()
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        tokens = [
            SampledToken(work.sequence, self._draw(work.sequence, work.start + len(work.tokens)), None, ())
            for work in plan.work
            if work.sample
        ]
        self._results.append(StepResult(plan.step, tuple(tokens), 1.0))

    def receive(self, timeout_s: float) -> StepResult | None:
        return self._results.popleft()

    def close(self) -> None:
        pass


def engine_saying(
    text: bytes, prompt_length: int = 1, num_stages: int = 1, seed: int | None = 0
) -> tuple[Engine, Script]:
    said = [*text, EOS]
    script = Script(lambda _, position: said[min(position - prompt_length, len(text))])
    limits = Limits(8, 64, 64, 4, 100, num_stages)
    engine = Engine(script, limits, vocab_size=257, eos_token_ids=(EOS,), tokenizer=byte_tokenizer(), seed=seed)
    return engine, script


def complete(engine: Engine, params: SamplingParams, prompt: str = "?") -> tuple[RequestOutput, list[Delta]]:
    name = engine.add(prompt, params)
    deltas = list(engine.run([name]))
    return engine.take(name), deltas


def test_text_ends_at_the_end_of_text_token() -> None:
    output, _ = complete(engine_saying(b"hello")[0], SamplingParams(max_tokens=50))
    assert (output.text, output.finish_reason) == ("hello", "stop")
    assert output.token_ids == (*b"hello", EOS)
    assert output.prompt_token_ids == (ord("?"),)


def test_max_tokens_ends_it_earlier() -> None:
    output, _ = complete(engine_saying(b"hello")[0], SamplingParams(max_tokens=3))
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("hel", "length", 3)


def test_ignore_eos_goes_on() -> None:
    output, _ = complete(engine_saying(b"hi")[0], SamplingParams(max_tokens=5, ignore_eos=True))
    assert output.token_ids == (*b"hi", EOS, EOS, EOS)
    assert output.finish_reason == "length"


def test_a_stop_token_ends_it_and_is_no_text() -> None:
    output, _ = complete(engine_saying(b"hello")[0], SamplingParams(max_tokens=50, stop_token_ids=(ord("l"),)))
    assert (output.text, output.finish_reason) == ("he", "stop")


@pytest.mark.parametrize(
    ("stop", "text"), [(("lo w",), "hel"), (("zzz", "o"), "hell"), (("world", "wo"), "hello "), (("h",), "")]
)
def test_a_stop_string_over_several_tokens_is_cut_off(stop: tuple[str, ...], text: str) -> None:
    output, deltas = complete(engine_saying(b"hello world")[0], SamplingParams(max_tokens=50, stop=stop))
    assert (output.text, output.finish_reason) == (text, "stop")
    assert "".join(delta.text for delta in deltas) == text


def test_text_that_only_begins_like_a_stop_string_comes_out() -> None:
    output, deltas = complete(engine_saying(b"hello world")[0], SamplingParams(max_tokens=50, stop=("low", "world!")))
    assert output.text == "hello world" == "".join(delta.text for delta in deltas)


def test_characters_of_several_tokens_come_out_whole() -> None:
    text = "naïve 日本 🙂"
    output, deltas = complete(engine_saying(text.encode())[0], SamplingParams(max_tokens=50))
    assert output.text == text
    assert all("\ufffd" not in delta.text for delta in deltas)


def test_a_character_cut_short_shows_as_replaced() -> None:
    output, _ = complete(engine_saying("é".encode())[0], SamplingParams(max_tokens=1))
    assert output.text == "\ufffd"


def test_requests_of_different_lengths_run_together() -> None:
    engine, script = engine_saying(b"abcdefgh", num_stages=2)
    names = [engine.add("?", SamplingParams(max_tokens=length)) for length in (2, 5, 3)]
    for _ in engine.run(names):
        pass
    assert [engine.take(name).text for name in names] == ["ab", "abcde", "abc"]
    assert max(len(plan.work) for plan in script.plans) == 2
    assert engine.num_unfinished == 0


def test_closing_the_stream_aborts_and_leaves_room_for_others() -> None:
    engine, _ = engine_saying(b"abcdefgh" * 10)
    name = engine.add("?", SamplingParams(max_tokens=80))
    stream = engine.run([name])
    next(stream)
    stream.close()
    assert engine.num_unfinished == 0
    output, _ = complete(engine, SamplingParams(max_tokens=4))
    assert output.text == "abcd"


def test_two_callers_in_turns_each_get_all_of_their_own() -> None:
    engine, _ = engine_saying(b"abcdefgh")
    first, second = (engine.add("?", SamplingParams(max_tokens=length)) for length in (4, 6))
    following = engine.run([first])
    heard = next(following).text
    assert "".join(delta.text for delta in engine.run([second])) == "abcdef"
    heard += "".join(delta.text for delta in following)
    assert heard == "abcd"
    assert [engine.take(name).text for name in (first, second)] == ["abcd", "abcdef"]


def test_callers_in_threads_each_get_all_of_their_own() -> None:
    engine, _ = engine_saying(b"abcdefgh" * 5)

    def follow(length: int) -> str:
        return complete(engine, SamplingParams(max_tokens=length))[0].text

    with ThreadPoolExecutor(6) as pool:
        texts = list(pool.map(follow, range(5, 35)))
    assert [len(text) for text in texts] == list(range(5, 35))


def test_whoever_follows_an_aborted_request_hears_so() -> None:
    engine, _ = engine_saying(b"abcdefgh")
    name = engine.add("?", SamplingParams(max_tokens=8))
    following = engine.run([name])
    next(following)
    engine.abort(name)
    assert [delta.finish_reason for delta in following] == ["abort"]
    assert engine.take(name).finish_reason == "abort"


@pytest.mark.parametrize("prompt", [5, None, ["a"], [[1]]])
def test_what_is_no_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is text or a list of token ids"):
        engine_saying(b"ok")[0].add(prompt, SamplingParams())


def test_the_seed_of_a_request_reaches_the_ranks() -> None:
    engine, script = engine_saying(b"ab")
    complete(engine, SamplingParams(seed=1234, temperature=1.0))
    assert script.plans[0].new[0].seed == 1234


def test_requests_without_seed_get_different_ones_and_the_same_on_the_next_run() -> None:
    seeds = []
    for _ in range(2):
        engine, script = engine_saying(b"ab")
        complete(engine, SamplingParams(temperature=1.0))
        complete(engine, SamplingParams(temperature=1.0))
        seeds.append([new.seed for plan in script.plans for new in plan.new])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "no tokens"),
        ([1] * 99, SamplingParams(max_tokens=10), "99 tokens and asks for 10 more, 109 in all, but at most 100 fit"),
        ([5, 257], SamplingParams(), "prompt token 257 is not in the vocabulary"),
        ([-1], SamplingParams(), "prompt token -1"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    prompt: list[int], params: SamplingParams, message: str
) -> None:
    engine, _ = engine_saying(b"ok")
    with pytest.raises(RequestError, match=message):
        engine.add(prompt, params)
    assert complete(engine, SamplingParams())[0].text == "ok"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("temperature", None),
        ("top_k", 2.5),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", None),
        ("stop_token_ids", 5),
        ("ignore_eos", "no"),
        ("seed", 2**63),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} is .*; allowed"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]
