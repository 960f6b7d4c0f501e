"""Requests through the engine: text, stops, limits, guides, failures. The ranks are a script; the tokens are bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.engine.scripted import EOS, VOCAB, Served, saying

from phalanx.engine.clock import ClockReading
from phalanx.engine.guide import ChoiceGuide
from phalanx.engine.messages import StageReport, StageStep
from phalanx.engine.sampling_params import SamplingParams, completion_seed
from phalanx.errors import PhalanxError, QueueFullError, RequestError

Say = Callable[..., Served]


@pytest.fixture
def say() -> Iterator[Say]:
    """Engines that say a text, closed in the end."""
    made: list[Served] = []

    def make(text: bytes, **options: Any) -> Served:
        made.append(saying(text, **options))
        return made[-1]

    yield make
    for served in made:
        served.close()


def test_text_ends_at_the_end_of_text_token(say: Say) -> None:
    output, _ = say(b"hello").complete(SamplingParams(max_tokens=50))
    assert (output.text, output.finish_reason) == ("hello", "stop")
    assert output.token_ids == (*b"hello", EOS)
    assert output.prompt_token_ids == (ord("?"),)


def test_max_tokens_ends_it_earlier(say: Say) -> None:
    output, _ = say(b"hello").complete(SamplingParams(max_tokens=3))
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("hel", "length", 3)


def test_ignore_eos_goes_on(say: Say) -> None:
    output, _ = say(b"hi").complete(SamplingParams(max_tokens=5, ignore_eos=True))
    assert output.token_ids == (*b"hi", EOS, EOS, EOS)
    assert output.finish_reason == "length"


def test_a_stop_token_ends_it_and_is_no_text(say: Say) -> None:
    output, _ = say(b"hello").complete(SamplingParams(max_tokens=50, stop_token_ids=(ord("l"),)))
    assert (output.text, output.finish_reason) == ("he", "stop")


@pytest.mark.parametrize(
    ("stop", "text"), [(("lo w",), "hel"), (("zzz", "o"), "hell"), (("world", "wo"), "hello "), (("h",), "")]
)
def test_a_stop_string_over_several_tokens_is_cut_off(say: Say, stop: tuple[str, ...], text: str) -> None:
    output, deltas = say(b"hello world").complete(SamplingParams(max_tokens=50, stop=stop))
    assert (output.text, output.finish_reason) == (text, "stop")
    assert "".join(delta.text for delta in deltas) == text


def test_a_stop_string_in_the_last_token_counts_as_stop(say: Say) -> None:
    output, _ = say(b"hello").complete(SamplingParams(max_tokens=3, stop=("l",)))
    assert (output.text, output.finish_reason) == ("he", "stop")


def test_stop_strings_wait_for_the_least_number_of_tokens(say: Say) -> None:
    output, _ = say(b"hello hello").complete(SamplingParams(max_tokens=50, min_tokens=6, stop=("l",)))
    assert output.text == "hello he"


def test_text_that_only_begins_like_a_stop_string_comes_out(say: Say) -> None:
    output, deltas = say(b"hello world").complete(SamplingParams(max_tokens=50, stop=("low", "world!")))
    assert output.text == "hello world" == "".join(delta.text for delta in deltas)


def test_characters_of_several_tokens_come_out_whole(say: Say) -> None:
    text = "naïve 日本 🙂"
    output, deltas = say(text.encode()).complete(SamplingParams(max_tokens=50))
    assert output.text == text
    assert all("\ufffd" not in delta.text for delta in deltas)


def test_a_character_cut_short_shows_as_replaced(say: Say) -> None:
    output, _ = say("é".encode()).complete(SamplingParams(max_tokens=1))
    assert output.text == "\ufffd"


def test_requests_of_different_lengths_run_together(say: Say) -> None:
    served = say(b"abcdefgh" * 4, num_stages=2)
    with ThreadPoolExecutor(3) as pool:
        outputs = pool.map(lambda length: served.complete(SamplingParams(max_tokens=length))[0], (20, 30, 25))
    assert [len(output.text) for output in outputs] == [20, 30, 25]
    assert served.driver.load == 0


def test_several_completions_of_a_prompt_have_seeds_of_their_own_and_end_together(say: Say) -> None:
    served = say(b"ab")
    output, deltas = served.complete(SamplingParams(n=3, max_tokens=2, temperature=1.0, seed=5))
    assert [each.text for each in output.completions] == ["ab"] * 3
    assert {delta.completion for delta in deltas} == {0, 1, 2}
    seeds = [new.sampling.seed for plan in served.script.plans for new in plan.new]
    assert seeds == [5, completion_seed(5, 1), completion_seed(5, 2)]
    assert len(set(seeds)) == 3


def test_an_aborted_request_ends_with_what_there_is_and_frees_its_pages_at_once(say: Say) -> None:
    served = say(b"abcdefgh" * 10, max_sequences=1)
    served.script.submit = lambda plan: None  # type: ignore[method-assign]  # ranks that take for ever
    request, inbox = served.submit(params=SamplingParams(max_tokens=80))
    served.driver.abort(request)
    [*_, output] = inbox.until_end()
    assert output.finish_reason == "abort"
    stats = served.driver.stats()
    assert (stats.running, stats.waiting, stats.pages_used, stats.aborted) == (0, 0, 0, 1)


def test_aborting_twice_or_late_does_nothing(say: Say) -> None:
    served = say(b"ab")
    request, inbox = served.submit()
    inbox.until_end()
    served.driver.abort(request)
    assert served.complete(SamplingParams())[0].text == "ab"
    assert served.driver.stats().aborted == 0


def test_a_guide_decides_every_token(say: Say) -> None:
    choices = [b"yes", b"no"]
    params = SamplingParams(max_tokens=10, guide=lambda: ChoiceGuide(choices, end_tokens=[EOS], vocab_size=VOCAB))
    output, _ = say(b"something else").complete(params)
    assert (output.text, output.finish_reason) == ("no", "stop")  # the script takes the lowest token of a mask


class BadGuide:
    def allowed(self) -> bytes:
        return bytes([255] * 33)

    def accept(self, token: int) -> None:
        raise ValueError(f"cannot go on from {token}")


def test_a_guide_that_fails_ends_its_own_request_only(say: Say) -> None:
    served = say(b"hello")
    with pytest.raises(ValueError, match="cannot go on from 0"):
        served.complete(SamplingParams(guide=BadGuide))
    assert served.complete(SamplingParams())[0].text == "hello"


def test_a_failure_of_the_ranks_ends_every_open_request_and_refuses_later_ones(say: Say) -> None:
    served = say(b"hello" * 10, failing_from=3)
    inboxes = [served.submit(params=SamplingParams(max_tokens=40))[1] for _ in range(3)]
    for inbox in inboxes:
        with pytest.raises(RuntimeError, match="the script's ranks have failed"):
            inbox.until_end()
    with pytest.raises(RuntimeError, match="the script's ranks have failed"):
        served.submit()
    assert served.driver.load == 0


def test_closing_ends_open_requests_with_an_error() -> None:
    served = saying(b"hello")
    served.script.submit = lambda plan: None  # type: ignore[method-assign]
    _, inbox = served.submit()
    served.close()
    with pytest.raises(PhalanxError, match="the engine was closed"):
        inbox.until_end()


def test_plans_are_sent_ahead_of_the_results(say: Say) -> None:
    served = say(b"abcdefgh" * 5)
    held: list[Any] = []
    submit = served.script.submit
    served.script.submit = held.append  # type: ignore[method-assign, assignment]
    _, inbox = served.submit(params=SamplingParams(max_tokens=9))
    deadline = time.monotonic() + 10
    while len(held) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [(len(plan.chunks), len(plan.decodes)) for plan in held] == [(1, 0), (0, 1)]
    served.script.submit = submit  # type: ignore[method-assign]
    for plan in held:
        submit(plan)
    [*_, output] = inbox.until_end()
    assert output.text == "abcdefgha"


@pytest.mark.parametrize("prompt", [5, None, ["a"], [[1]]])
def test_what_is_no_prompt_is_refused(say: Say, prompt: Any) -> None:
    with pytest.raises(RequestError, match="a prompt is text or a list of token ids"):
        say(b"ok").submit(prompt)


def test_the_seed_of_a_request_reaches_the_ranks(say: Say) -> None:
    served = say(b"ab")
    served.complete(SamplingParams(seed=1234, temperature=1.0))
    assert served.script.plans[0].new[0].sampling.seed == 1234


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "no tokens"),
        ([1] * 99, SamplingParams(max_tokens=10), "99 tokens and asks for 10 more, 109 in all, but at most 100 fit"),
        ([5, 257], SamplingParams(), "prompt token 257 is not in the vocabulary"),
        ([-1], SamplingParams(), "prompt token -1"),
        ([1], SamplingParams(logit_bias={300: 1.0}), "logit_bias.*300"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_and_the_engine_goes_on(
    say: Say, prompt: list[int], params: SamplingParams, message: str
) -> None:
    served = say(b"ok")
    with pytest.raises(RequestError, match=message):
        served.submit(prompt, params)
    assert served.complete(SamplingParams())[0].text == "ok"


def test_more_than_may_run_and_wait_are_refused_until_there_is_room(say: Say) -> None:
    served = say(b"ok", max_sequences=2, max_waiting=1)
    run, served.script.submit = served.script.submit, lambda plan: None  # type: ignore[method-assign]
    params = SamplingParams(n=3)
    request, inbox = served.submit(params=params)
    with pytest.raises(QueueFullError, match="3 completions are running or waiting; 1 more would exceed the 2"):
        served.submit()
    served.driver.abort(request)
    inbox.until_end()
    served.script.submit = run  # type: ignore[method-assign]
    with pytest.raises(RequestError, match="4 completions at once are more than the 2 that may run"):
        served.submit(params=SamplingParams(n=4))


def test_a_stop_string_may_begin_before_the_least_number_of_tokens(say: Say) -> None:
    output, deltas = say(b"hello hello").complete(SamplingParams(max_tokens=50, min_tokens=5, stop=("ell", "llo ")))
    assert (output.text, output.finish_reason) == ("he", "stop")
    assert "".join(delta.text for delta in deltas) == "he"


def test_control_tokens_are_shown_where_they_are_asked_for(say: Say) -> None:
    text = b"a"
    hidden, shown = (
        say(text).complete(SamplingParams(max_tokens=3, ignore_eos=True, skip_special_tokens=skip))[0]
        for skip in (True, False)
    )
    assert hidden.text == "a"
    assert shown.text.startswith("a")
    assert len(shown.text) > 1


def test_waiting_and_what_was_computed_before_are_told(say: Say) -> None:
    served = say(b"ok", prompt_length=9, max_sequences=1)
    first, second = (served.complete(SamplingParams(), [7] * 9)[0] for _ in range(2))
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 8)
    assert 0 <= first.timings.queued_s <= first.timings.time_to_first_token_s


def test_a_failed_engine_says_so_even_where_its_queue_was_full(say: Say) -> None:
    served = say(b"hello" * 10, failing_from=3, max_sequences=1, max_waiting=1)
    inboxes = [served.submit(params=SamplingParams(max_tokens=40))[1] for _ in range(2)]
    for inbox in inboxes:
        with pytest.raises(RuntimeError, match="have failed"):
            inbox.until_end()
    with pytest.raises(RuntimeError, match="have failed"):
        served.submit()


class ArrayGuide:
    """A guide whose masks are another kind of bytes."""

    def allowed(self) -> Any:
        return bytearray(b"\xff") * 33

    def accept(self, token: int) -> None:
        pass


def test_a_mask_may_be_any_buffer_and_a_parameter_any_number(say: Say) -> None:
    served = say(b"hello")
    served.complete(
        SamplingParams(max_tokens=2, guide=ArrayGuide, temperature=np.float64(0.5), logit_bias={5: np.float64(1)})
    )
    for plan in served.script.plans:
        assert msgspec.msgpack.encode(plan)
        assert all(type(mask) is bytes for _, mask in plan.masks)


def test_stats_count_what_went_by(say: Say) -> None:
    served = say(b"hello")
    for _ in range(2):
        served.complete(SamplingParams(max_tokens=4), prompt=list(range(1, 2)))
    stats = served.driver.stats()
    assert (stats.requests, stats.finished, stats.prompt_tokens, stats.output_tokens) == (2, 2, 2, 8)
    assert stats.tokens_per_s > 0


def test_what_stages_report_shows_how_busy_they_are(say: Say) -> None:
    served = say(b"hello")
    now_s = time.perf_counter()
    served.script.messages.put(StageReport(0, (StageStep(0, now_s - 2.0, now_s),), ClockReading()))
    deadline = time.monotonic() + 10
    while served.driver.stats().stage_busy == (0.0,) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 0.1 < served.driver.stats().stage_busy[0] <= 0.4


def test_steps_of_another_machine_are_put_on_the_engines_clock(say: Say) -> None:
    timeline = say(b"").engine.timeline
    timeline.add(StageReport(0, (StageStep(0, 5001.0, 5002.0),), ClockReading(-5000.0, 0.1)))
    assert timeline.steps() == [[StageStep(0, 1.0, 2.0)]]
