"""What is told of a body that cannot be taken: which field, what was found, what is allowed."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5], "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
}


@pytest.mark.parametrize(
    ("path", "fields", "param", "message"),
    [
        ("/v1/completions", {"max_tokens": 1.5}, "max_tokens", "max_tokens: found 1.5; allowed: an integer"),
        ("/v1/completions", {"n": 0}, "n", "n: found 0; allowed: greater than or equal to 1"),
        ("/v1/completions", {"prompt": 5}, "prompt", "prompt: found 5; allowed: a text, token ids, or a list of"),
        ("/v1/completions", {"prompt": [5, "a"]}, "prompt.1", "prompt.1: found 'a'; allowed: an integer"),
        ("/v1/completions", {"prompt": []}, "prompt", "prompt: found an array; allowed: at least 1 item, not 0"),
        ("/v1/completions", {"stop": 5}, "stop", "stop: found 5; allowed: a string or an array"),
        ("/v1/completions", {"stop": ["a", 5]}, "stop.1", "stop.1: found 5; allowed: a string"),
        ("/v1/completions", {"max_token": 5}, "max_token", "max_token: unknown field; meant max_tokens?"),
        ("/v1/completions", {"X": 5}, "X", "X: unknown field; /openapi.json says which there are"),
        ("/v1/completions", {"max_tokens": 0}, "max_tokens", "max_tokens is 0; allowed: at least 1"),
        ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens", "max_tokens is 0; allowed: at least 1"),
        ("/v1/completions", {"guided_regex": "(a"}, "guided_regex", "the regular expression cannot be followed"),
        (
            "/v1/completions",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": []}}}},
            "response_format",
            "the JSON schema cannot be followed: Unsatisfiable schema",
        ),
        (
            "/v1/completions",
            {"guided_choice": ["a"], "allowed_token_ids": [5]},
            "allowed_token_ids",
            "allowed_token_ids and a form of the text are asked for together; give one of them",
        ),
        ("/v1/completions", {"echo": {}}, "echo", "echo: found an object; allowed: a boolean"),
        ("/v1/completions", {"logit_bias": {"5": None}}, "logit_bias.5", "logit_bias.5: found null; allowed: a num"),
        ("/v1/chat/completions", {"messages": []}, "messages", "messages: found an array; allowed: at least 1 item"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages.0.content.0.text",
            "messages.0.content.0.text: this field is needed",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 1025}]},
            "messages.0.content",
            "messages.0.content: found an array; allowed: at most 1024 items, not 1025",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "robot", "content": ""}]},
            "messages.0.role",
            "messages.0.role: found 'robot'; allowed: 'system', 'developer', 'user', 'assistant' or 'tool'",
        ),
        (
            "/v1/chat/completions",
            {"tool_choice": "any"},
            "tool_choice",
            "tool_choice: found 'any'; allowed: 'none', 'auto' or 'required' or an object",
        ),
        (
            "/v1/chat/completions",
            {"tool_choice": {"type": "function"}},
            "tool_choice.function",
            "tool_choice.function: this field is needed",
        ),
        (
            "/v1/chat/completions",
            {"chat_template_kwargs": {"self": 1}},
            "chat_template_kwargs",
            "chat_template_kwargs sets self, which is the request's to say",
        ),
        ("/v1/completions", {"n": 200, "seed": "x"}, "n", "n: found 200; allowed: less than or equal to 128; seed: f"),
    ],
)  # fmt: skip
def test_a_refusal_names_the_field_what_was_found_and_what_is_allowed(
    http: httpx2.Client, path: str, fields: dict[str, Any], param: str, message: str
) -> None:
    response = http.post(path, json={**BASES[path], **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(message)


def test_many_problems_are_told_in_few_words(http: httpx2.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": [5], **{f"x{place}": 1 for place in range(100)}})
    [first, *_, last] = response.json()["error"]["message"].split("; ")
    assert first == "x0: unknown field"
    assert last == "and 92 more problems"


def test_a_picture_is_refused_in_so_many_words(http: httpx2.Client) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}]
    response = http.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400
    assert "messages.0.content.1.type: found 'image_url'; allowed: 'text'" in response.text
