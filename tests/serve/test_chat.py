"""`/v1/chat/completions` as OpenAI's own client sees it: templates, tools, forms of the text."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import pytest
from tests.serve.live import Live

from phalanx import SamplingParams

GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "max_tokens": 12}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}


def completed(server: Live, text: str, **params: Any) -> Any:
    """What the engine makes of a conversation's text."""
    [output] = server.run(lambda: server.engine.generate([text], SamplingParams(**{"max_tokens": 12, **params})))
    return output


def chat(http: httpx2.Client, **body: Any) -> Any:
    response = http.post("/v1/chat/completions", json={"messages": HELLO, **GREEDY, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_conversation_is_told_in_the_template(client: openai.OpenAI, server: Live) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "he"}, {"type": "text", "text": "llo"}]},
    ]
    answer = client.chat.completions.create(messages=messages, **GREEDY)
    wanted = completed(server, "<system>be kind<user>hello<assistant>")
    assert answer.choices[0].message.content == wanted.text
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)


def test_a_stream_says_who_speaks_then_what(client: openai.OpenAI, server: Live) -> None:
    chunks = list(
        client.chat.completions.create(messages=HELLO, stream=True, stream_options={"include_usage": True}, **GREEDY)
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        completed(server, "<user>hello<assistant>").text
    )
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 12


def test_without_a_limit_an_answer_may_fill_the_model(http: httpx2.Client, server: Live) -> None:
    answer = chat(http, max_tokens=None, temperature=1.0, seed=1, ignore_eos=True)
    assert answer["usage"]["total_tokens"] == server.engine.limits.max_length


def test_several_answers_are_told_apart(http: httpx2.Client) -> None:
    answer = chat(http, n=3, temperature=1.0, seed=5)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) == 3
    assert answer["usage"]["completion_tokens"] == 36


def test_logprobs_name_tokens_by_their_bytes(http: httpx2.Client, server: Live) -> None:
    content = chat(http, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    wanted = completed(server, "<user>hello<assistant>", logprobs=2)
    assert [each["logprob"] for each in content] == pytest.approx([each.logprob for each in wanted.logprobs])
    assert [bytes(each["bytes"]) for each in content] == [
        server.engine.tokenizer.token_bytes(token) for token in wanted.token_ids
    ]
    assert all(len(each["top_logprobs"]) == 2 for each in content)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "'text'"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"max_completion_tokens": 3, "max_tokens": 4}, "differ"),
        ({"tool_choice": "required"}, "no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "time"}}}, "weather"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"response_format": {"type": "json_schema"}}, "schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "together"),
    ],
)
def test_what_does_not_go_together_is_said(http: httpx2.Client, body: dict[str, Any], words: str) -> None:
    response = http.post("/v1/chat/completions", json={"messages": HELLO, **GREEDY, **body})
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_json_schema_is_followed(client: openai.OpenAI, stream: bool) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    answer = client.chat.completions.create(
        messages=HELLO, response_format=form, stream=stream, model="tiny", max_tokens=64, temperature=1.0, seed=2
    )
    if isinstance(answer, openai.Stream):
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content or ""
    person = json.loads(text)
    assert person["name"] in ("ada", "bob")
    assert 0 <= person["age"] <= 99


@pytest.mark.parametrize(
    ("form", "allowed"),
    [({"guided_regex": "(ab|ba){3}"}, r"(ab|ba){3}"), ({"guided_choice": ["left", "right"]}, "left|right")],
)
def test_other_forms_are_followed(http: httpx2.Client, form: dict[str, Any], allowed: str) -> None:
    import re

    for seed in range(4):
        answer = chat(http, **form, temperature=1.0, seed=seed)
        assert re.fullmatch(allowed, answer["choices"][0]["message"]["content"])
        assert answer["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_can_be_forced(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    tools: list[Any] = [WEATHER]
    answer = client.chat.completions.create(
        messages=HELLO, tools=tools, tool_choice=choice, stream=stream, model="tiny", max_tokens=200, temperature=1.0,
        seed=4, parallel_tool_calls=False,
    )  # fmt: skip
    if isinstance(answer, openai.Stream):
        chunks = list(answer)
        pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
        [name] = [piece.function.name for piece in pieces if piece.function and piece.function.name]
        arguments = "".join(piece.function.arguments or "" for piece in pieces if piece.function)
        reason = chunks[-1].choices[0].finish_reason
        assert pieces[0].id
    else:
        [call] = answer.choices[0].message.tool_calls or []
        assert call.type == "function"
        name, arguments, reason = call.function.name, call.function.arguments, answer.choices[0].finish_reason
    assert name == "weather"
    assert set(json.loads(arguments)) == {"town", "days"}
    assert reason == "tool_calls"


def test_a_call_goes_back_into_the_conversation(http: httpx2.Client, server: Live) -> None:
    messages = [
        *HELLO,
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Oslo"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    tools = '[{"type": "function", "function": {"name": "f"}}]'
    calls = '[{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}]'
    answer = chat(http, messages=messages, tools=json.loads(tools), tool_choice="none", return_token_ids=True)
    assert bytes(server.engine.tokenizer.decode(answer["prompt_token_ids"]), "utf-8") == (
        f"<user>hello<assistant>{calls}<tool>rain<assistant>".encode()
    )
    named = chat(http, tools=json.loads(tools), tool_choice="none")
    assert named["usage"]["prompt_tokens"] == len("<user>hello<assistant>")


def test_a_template_gets_its_own_variables(http: httpx2.Client, server: Live) -> None:
    open_ended = chat(http, add_generation_prompt=False, return_token_ids=True)
    assert server.engine.tokenizer.decode(open_ended["prompt_token_ids"]) == "<user>hello"
