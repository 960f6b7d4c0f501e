"""`/v1/completions` as OpenAI's own client sees it: the engine's tokens, whole and streamed."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from tests.serve.live import Live

from phalanx import SamplingParams

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "max_tokens": 12}
PROMPT = "The capital of France"


def engine_output(server: Live, prompt: Any, **params: Any) -> Any:
    """What the engine itself makes of a prompt."""
    [output] = server.run(lambda: server.engine.generate([prompt], SamplingParams(**{"max_tokens": 12, **params})))
    return output


def events(http: httpx2.Client, path: str, body: dict[str, Any]) -> list[Any]:
    """The data of all events of a stream; the last must be [DONE]."""
    response = http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_the_engines(client: openai.OpenAI, server: Live) -> None:
    answer = client.completions.create(prompt=PROMPT, **GREEDY)
    wanted = engine_output(server, PROMPT)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == wanted.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(wanted.prompt_token_ids), 12)
    assert answer.usage.total_tokens == len(wanted.prompt_token_ids) + 12


def test_a_stream_gives_the_same_text_in_pieces(client: openai.OpenAI, server: Live) -> None:
    chunks = list(client.completions.create(prompt=PROMPT, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in chunks) == engine_output(server, PROMPT).text
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length"
    assert len(chunks) > 2
    assert len({chunk.id for chunk in chunks}) == 1


def test_usage_comes_last_where_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_every_chunk_tells_the_usage_so_far_where_that_is_asked_for(http: httpx2.Client) -> None:
    found = events(
        http, "/v1/completions", {"prompt": [5, 6], **GREEDY, "stream_options": {"continuous_usage_stats": True}}
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts)
    assert counts[-1] == 12


@pytest.mark.parametrize(
    ("prompt", "num"),
    [("abc", 1), (["abc", "d"], 2), ([97, 98, 99], 1), ([[97, 98], [99], [100]], 3)],
    ids=["text", "texts", "tokens", "token lists"],
)
def test_a_prompt_has_four_forms(http: httpx2.Client, server: Live, prompt: Any, num: int) -> None:
    answer = http.post("/v1/completions", json={"prompt": prompt, **GREEDY, "n": 2, "return_token_ids": True}).json()
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(2 * num))
    prompts = prompt if num > 1 else [prompt]
    for place, each in enumerate(prompts):
        wanted = engine_output(server, each)
        for choice in choices[2 * place : 2 * place + 2]:
            assert choice["token_ids"] == list(wanted.token_ids)
            assert choice["prompt_token_ids"] == list(wanted.prompt_token_ids)
            assert choice["text"] == wanted.text


def test_streamed_choices_are_told_apart(http: httpx2.Client, server: Live) -> None:
    body = {"prompt": ["abc", "xyz"], **GREEDY, "n": 2, "temperature": 1.0, "seed": 7}
    whole = http.post("/v1/completions", json=body).json()["choices"]
    texts = [""] * 4
    for chunk in events(http, "/v1/completions", body):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole]
    assert len(set(texts)) == 4


def test_parameters_reach_the_engine(http: httpx2.Client, server: Live) -> None:
    params: dict[str, Any] = {
        "temperature": 0.9,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.25,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [9],
    }
    body = {"prompt": "abc", "max_tokens": 12, "logit_bias": {"65": 5.0}, **params, "return_token_ids": True}
    answer = http.post("/v1/completions", json=body).json()
    params["stop_token_ids"] = (9,)
    wanted = engine_output(server, "abc", logit_bias={65: 5.0}, **params)
    assert answer["choices"][0]["token_ids"] == list(wanted.token_ids)


def test_null_is_the_default(http: httpx2.Client) -> None:
    document = http.get("/openapi.json").json()
    fields = document["components"]["schemas"]["CompletionRequest"]["properties"]
    nulls = {name: None for name in fields if name != "prompt"}
    answer = http.post("/v1/completions", json={"prompt": "abc", **nulls}).json()
    assert answer["usage"]["completion_tokens"] == 16


def test_a_stop_string_ends_the_text_before_it(http: httpx2.Client, server: Live) -> None:
    text = engine_output(server, PROMPT).text
    stop = text[4:6]
    answer = http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, "stop": stop}).json()
    assert answer["choices"][0]["text"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_logprobs_are_the_engines(http: httpx2.Client, server: Live) -> None:
    answer = http.post("/v1/completions", json={"prompt": [97, 98], **GREEDY, "logprobs": 2}).json()
    found = answer["choices"][0]["logprobs"]
    wanted = engine_output(server, [97, 98], logprobs=2).logprobs
    assert found["token_logprobs"] == pytest.approx([each.logprob for each in wanted])
    assert [sorted(top.values(), reverse=True) for top in found["top_logprobs"]] == [
        pytest.approx([logprob for _, logprob in each.top]) for each in wanted
    ]
    assert len(found["tokens"]) == len(found["text_offset"]) == 12


def test_streamed_logprobs_are_those_of_the_whole(http: httpx2.Client) -> None:
    body = {"prompt": [97, 98], **GREEDY, "logprobs": 1}
    whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    joined: dict[str, list[Any]] = {name: [] for name in ("tokens", "token_logprobs", "top_logprobs")}
    for chunk in events(http, "/v1/completions", body):
        for name, values in joined.items():
            values.extend(chunk["choices"][0]["logprobs"][name])
    assert joined == {name: whole[name] for name in joined}


def test_echo_puts_the_prompt_first(http: httpx2.Client, server: Live) -> None:
    wanted = engine_output(server, PROMPT)
    whole = http.post("/v1/completions", json={"prompt": PROMPT, **GREEDY, "echo": True}).json()
    assert whole["choices"][0]["text"] == PROMPT + wanted.text
    streamed = events(http, "/v1/completions", {"prompt": PROMPT, **GREEDY, "echo": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == PROMPT + wanted.text


def test_a_prompt_is_scored_without_new_tokens(http: httpx2.Client, server: Live) -> None:
    body = {"prompt": "abcd", "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    answer = http.post("/v1/completions", json=body).json()
    choice = answer["choices"][0]
    wanted = engine_output(server, "abcd", max_tokens=1, prompt_logprobs=1).prompt_logprobs
    assert choice["text"] == "abcd"
    assert choice["logprobs"]["tokens"] == ["a", "b", "c", "d"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["token_logprobs"] == [None, *(pytest.approx(each.logprob) for each in wanted)]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert answer["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_come_by_token(http: httpx2.Client, server: Live) -> None:
    answer = http.post("/v1/completions", json={"prompt": "abcd", "max_tokens": 1, "prompt_logprobs": 2}).json()
    found = answer["choices"][0]["prompt_logprobs"]
    wanted = engine_output(server, "abcd", max_tokens=1, prompt_logprobs=2).prompt_logprobs
    assert found[0] is None
    for entries, each in zip(found[1:], wanted, strict=True):
        assert entries[str(each.token)]["logprob"] == pytest.approx(each.logprob)
        assert [entries[str(token)]["rank"] for token, _ in each.top] == [1, 2]


def test_a_shared_prefix_is_told_in_the_usage(http: httpx2.Client) -> None:
    body = {"prompt": list(range(40, 80)), "max_tokens": 1}
    http.post("/v1/completions", json=body)
    answer = http.post("/v1/completions", json=body).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 36
