"""`LLM` and `AsyncEngine` over real ranks of a small model: one interface, waited for in two ways."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.tiny_models import TINY_MODELS, VOCAB, Reference, make

from phalanx import LLM, AsyncEngine, Delta, RequestOutput, SamplingParams
from phalanx.engine.guide import ChoiceGuide
from phalanx.errors import PhalanxError, RequestError

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(TINY_MODELS["smollm2"], tmp_path_factory.mktemp("model"))


def sections(model: Path, **engine: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(model), "dtype": "float32"},
        "cluster": {"ray": "none", "device": "cpu"},
        "engine": {"kv_cache": "8MiB", "page_size": 4, **engine},
    }


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(**sections(model)) as llm:
        yield llm


def test_prompt_logprobs_are_those_of_transformers(llm: LLM, model: Path) -> None:
    [output] = llm.generate([PROMPT], SamplingParams(max_tokens=1, prompt_logprobs=2, logprobs=0))
    expected = Reference(model).logits(PROMPT).double().log_softmax(-1)
    assert output.prompt_logprobs is not None
    assert [each.token for each in output.prompt_logprobs] == PROMPT[1:]
    for position, each in enumerate(output.prompt_logprobs):
        assert each.logprob == pytest.approx(expected[position, PROMPT[position + 1]].item(), abs=1e-4)
        assert [token for token, _ in each.top] == expected[position].topk(2).indices.tolist()
    assert output.logprobs is not None
    assert output.logprobs[0].logprob == pytest.approx(expected[-1].max().item(), abs=1e-4)


def test_prompt_logprobs_of_a_long_prompt_come_from_its_chunks(model: Path) -> None:
    prompt = [(7 * number) % VOCAB for number in range(100)]
    shared = {"pipeline": 2, "head": "shared"}  # the first stage multiplies by a part of the head, for these rows too
    with LLM(**sections(model, max_batch_tokens=80, max_sequences=8), parallel=shared) as llm:
        llm.generate([prompt], SamplingParams(max_tokens=1))  # what is kept of it must not leave out any
        [output] = llm.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=0))
    expected = Reference(model).logits(prompt).double().log_softmax(-1)
    assert output.prompt_logprobs is not None
    found = [each.logprob for each in output.prompt_logprobs]
    assert found == pytest.approx([expected[at, token].item() for at, token in enumerate(prompt[1:])], abs=1e-4)


def test_completions_of_one_prompt_differ_and_share_its_pages(llm: LLM) -> None:
    before = llm.stats().prompt_tokens_cached
    [output] = llm.generate([[*PROMPT, 1, 2]], SamplingParams(n=4, temperature=1.5, seed=3, max_tokens=12))
    assert len({each.token_ids for each in output.completions}) == 4
    assert llm.stats().prompt_tokens_cached - before >= 3 * 8
    assert output.completions[0].token_ids == output.token_ids


def test_the_first_completion_is_that_of_a_request_for_one(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 12}
    [several] = llm.generate([PROMPT], SamplingParams(n=3, **params))
    [one] = llm.generate([PROMPT], SamplingParams(**params))
    assert several.token_ids == one.token_ids


def test_a_guide_holds_the_tokens_to_its_choices(llm: LLM) -> None:
    choices = [[11, 12, 13], [11, 14]]
    params = SamplingParams(
        max_tokens=8,
        temperature=1.0,
        stop_token_ids=(0,),
        guide=lambda: ChoiceGuide(choices, end_tokens=[0], vocab_size=VOCAB),
    )
    drawn = {llm.generate([PROMPT], params)[0].token_ids for _ in range(8)}
    assert drawn <= {(11, 12, 13, 0), (11, 14, 0)}


def test_a_call_is_aborted_by_its_id_from_another_thread(llm: LLM) -> None:
    stream = llm.stream([PROMPT], SamplingParams(max_tokens=150, ignore_eos=True), request_id="mine")
    next(stream)
    threading.Thread(target=llm.abort, args=("mine",)).start()
    *_, output = stream
    assert isinstance(output, RequestOutput)
    assert output.finish_reason == "abort"
    assert 0 < len(output.token_ids) < 150
    llm.abort("mine")
    llm.abort("never there")


def test_a_call_needs_an_id_of_its_own(llm: LLM) -> None:
    stream = llm.stream([PROMPT], SamplingParams(max_tokens=50), request_id="mine")
    next(stream)
    with pytest.raises(RequestError, match="a request 'mine' runs already"):
        llm.generate([PROMPT], request_id="mine")
    stream.close()
    llm.generate([PROMPT], SamplingParams(max_tokens=1), request_id="mine")


def test_closing_a_stream_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream([PROMPT, PROMPT[::-1]], SamplingParams(max_tokens=150, ignore_eos=True))
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while llm.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (llm.stats().running, llm.stats().pages_used) == (0, 0)


def test_one_bad_prompt_of_several_is_named_and_nothing_runs(llm: LLM) -> None:
    requests = llm.stats().requests
    with pytest.raises(RequestError, match="prompt 1: prompt token 999 is not in the vocabulary"):
        llm.generate([PROMPT, [999]])
    assert llm.stats().requests == requests


def test_closing_ends_those_who_wait_with_an_error(model: Path) -> None:
    llm = LLM(**sections(model))
    stream = llm.stream([PROMPT], SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    llm.close()
    with pytest.raises(PhalanxError, match="the engine was closed"):
        list(stream)
    with pytest.raises(RequestError, match="this LLM is closed"):
        llm.generate([PROMPT])


def test_replicas_share_the_work_and_a_prompt_returns_to_where_it_was(model: Path) -> None:
    prompts = [[first] * 70 for first in range(1, 7)]
    with LLM(**sections(model), parallel={"replicas": 2}) as llm:
        first = llm.generate(prompts, SamplingParams(max_tokens=4))
        assert all(stats.requests == 3 for stats in llm.replica_stats())
        again = llm.generate(prompts, SamplingParams(max_tokens=4))
        assert [output.token_ids for output in again] == [output.token_ids for output in first]
        assert llm.stats().prompt_tokens_cached >= len(prompts) * 68
        assert llm.stats().pages == sum(stats.pages for stats in llm.replica_stats())


async def first_of(events: AsyncIterator[Delta | RequestOutput]) -> Delta | RequestOutput:
    async for event in events:
        return event
    raise AssertionError("nothing came")


def test_an_async_engine_serves_many_coroutines_at_once(model: Path, llm: LLM) -> None:
    prompts = [[*PROMPT, number] for number in range(20)]
    expected = [output.token_ids for output in llm.generate(prompts, SamplingParams(max_tokens=6))]

    async def main() -> list[list[RequestOutput]]:
        async with AsyncEngine(**sections(model, max_sequences=8)) as engine:
            outputs = await asyncio.gather(
                *[engine.generate(prompt, SamplingParams(max_tokens=6)) for prompt in prompts]
            )
            stats = await engine.stats()
            assert (stats.finished, stats.running) == (20, 0)
            return list(outputs)

    assert [output.token_ids for [output] in asyncio.run(main())] == expected


def test_cancelling_a_coroutine_aborts_its_request(model: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(**sections(model)) as engine:
            task = asyncio.create_task(engine.generate(PROMPT, SamplingParams(max_tokens=200, ignore_eos=True)))
            while not (await engine.stats()).running:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            deadline = time.monotonic() + 10
            while (await engine.stats()).running and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            stats = await engine.stats()
            assert (stats.running, stats.aborted, stats.pages_used) == (0, 1, 0)

    asyncio.run(main())


def test_an_id_used_again_at_once_hears_nothing_of_the_call_before(model: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(**sections(model)) as engine:
            for number in range(10):
                stream = engine.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True), request_id="mine")
                await anext(stream)
                await stream.aclose()
                [output] = await engine.generate([number + 1] * 5, SamplingParams(max_tokens=3), request_id="mine")
                assert (len(output.token_ids), output.prompt_token_ids) == (3, (number + 1,) * 5)

    asyncio.run(main())


def test_a_replica_that_has_failed_gets_no_more_requests(model: Path) -> None:
    with LLM(**sections(model), parallel={"tensor": 2, "replicas": 2}) as llm:
        before = llm.generate([PROMPT], SamplingParams(max_tokens=4))
        os.kill(llm.startup.ranks[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while llm.failures[0] is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert llm.failures[0] is not None, "it is noticed with nobody asking for anything"
        assert llm.failure is None, "the other replica runs"
        for _ in range(5):
            assert llm.generate([PROMPT], SamplingParams(max_tokens=4))[0].token_ids == before[0].token_ids


def test_a_stream_gives_the_same_text_in_pieces(model: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(**sections(model)) as engine:
            events = [event async for event in engine.stream("hello", SamplingParams(max_tokens=20))]
            *deltas, output = events
            assert isinstance(output, RequestOutput)
            assert "".join(event.text for event in deltas if isinstance(event, Delta)) == output.text
            assert isinstance(await first_of(engine.stream("again", SamplingParams(max_tokens=50))), Delta)

    asyncio.run(main())


def test_engine_errors_reach_coroutines(model: Path) -> None:
    async def main() -> None:
        async with AsyncEngine(**sections(model)) as engine:
            with pytest.raises(RequestError, match="no tokens"):
                await engine.generate([[]])

    asyncio.run(main())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the stream that nobody closes
def test_a_loop_that_is_closed_early_does_no_harm_to_the_engine(model: Path) -> None:
    with contextlib.closing(AsyncEngine(**sections(model))) as engine:
        loop = asyncio.new_event_loop()
        events = engine.stream(PROMPT, SamplingParams(max_tokens=100, ignore_eos=True))
        assert isinstance(loop.run_until_complete(first_of(events)), Delta)
        loop.close()
        [output] = asyncio.run(engine.generate(PROMPT, SamplingParams(max_tokens=3)))
        assert len(output.token_ids) == 3
        assert engine.failure is None
