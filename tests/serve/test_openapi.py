"""The OpenAPI document: what it says of requests is what is taken, what it says of answers is what comes."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import httpx2
import jsonschema  # type: ignore[import-untyped]
import pytest
import schemathesis
from pydantic import BaseModel
from tests.serve.live import Live

from phalanx.serve import answers, protocol
from phalanx.serve.app import GETS, POSTS, REFUSALS
from phalanx.serve.errors import TYPES

HELLO = [{"role": "user", "content": "hello"}]
PROMPT: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 3, "temperature": 0}
CHAT: dict[str, Any] = {"messages": HELLO, "max_tokens": 3, "temperature": 0}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"enum": [{}]}}}


class Document:
    """What a server says of itself."""

    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

    @cached_property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = self._http.get("/openapi.json").json()
        return found

    def schema(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["components"]["schemas"][name]
        return found

    def check(self, value: object, name: str) -> None:
        """Raises jsonschema.ValidationError for a value that is not what a component's schema says."""
        jsonschema.Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", "components": self.data["components"]}
        ).validate(value)

    def check_answer(self, response: httpx2.Response) -> None:
        """The same for an answer, by its path, method and status."""
        request = response.request
        operation = self.data["paths"][request.url.path][request.method.lower()]
        content = operation["responses"][str(response.status_code)]["content"]
        schema = content[response.headers["content-type"].partition(";")[0]]["schema"]
        self.check(response.json(), schema["$ref"].rpartition("/")[2])


@pytest.fixture(scope="module")
def document(http: httpx2.Client) -> Document:
    return Document(http)


def test_the_document_is_valid(document: Document) -> None:
    assert document.data["openapi"].startswith("3.1")
    schemathesis.openapi.from_dict(document.data).validate()


def test_every_path_is_in_the_document(document: Document) -> None:
    operations = {(path, method) for path, found in document.data["paths"].items() for method in found}
    assert operations == {(path, "post") for path, *_ in POSTS} | {(path, "get") for path, *_ in GETS}


@pytest.mark.parametrize("path", [path for path, *_ in POSTS])
def test_every_refusal_is_in_the_document(document: Document, path: str) -> None:
    responses = document.data["paths"][path]["post"]["responses"]
    assert set(responses) == {"200", *map(str, REFUSALS)}
    assert set(TYPES) <= set(REFUSALS)


@pytest.mark.parametrize("wanted", [wanted for _, _, wanted, *_ in POSTS])
def test_every_field_of_a_body_is_in_the_document(document: Document, wanted: type[BaseModel]) -> None:
    schema = document.schema(wanted.__name__)
    assert set(schema["properties"]) == set(wanted.model_fields)
    assert schema["additionalProperties"] is False


def test_no_two_things_share_a_name() -> None:
    def classes(module: Any) -> set[str]:
        return {
            name for name, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__
        }

    assert classes(protocol) & classes(answers) == set()


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", PROMPT),
        ("/v1/completions", {**PROMPT, "n": 2, "temperature": 1, "logprobs": 3, "echo": True}),
        ("/v1/completions", {**PROMPT, "prompt_logprobs": 2, "return_token_ids": True}),
        ("/v1/completions", {**PROMPT, "allowed_token_ids": [5], "logprobs": 20}),
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 20, "return_token_ids": True}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"}),
        ("/tokenize", {"prompt": "hello", "return_token_strs": True}),
        ("/tokenize", {"messages": HELLO}),
        ("/detokenize", {"tokens": [5, 6]}),
    ],
)
def test_an_answer_is_as_the_document_says(
    document: Document, http: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    document.check_answer(response)


@pytest.mark.parametrize("path", [path for path, *_ in GETS])
def test_what_operators_look_at_is_as_the_document_says(document: Document, http: httpx2.Client, path: str) -> None:
    response = http.get(path)
    assert response.status_code == 200
    document.check_answer(response)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {}),
        ("/v1/completions", {**PROMPT, "model": "other"}),
        ("/v1/chat/completions", {**CHAT, "n": 0}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
def test_a_refusal_is_as_the_document_says(
    document: Document, http: httpx2.Client, path: str, body: dict[str, Any]
) -> None:
    response = http.post(path, json=body)
    assert response.status_code in (400, 404)
    document.check_answer(response)


def events(response: httpx2.Response) -> Iterator[Any]:
    """The data of a stream, which must end as streams do."""
    *chunks, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    for chunk in chunks:
        yield json.loads(chunk.removeprefix("data: "))


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/v1/completions", {**PROMPT, "logprobs": 2, "return_token_ids": True, "n": 2}, "Completion"),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}, "ChatChunk"),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 60, "tools": [TOOL], "tool_choice": "required"}, "ChatChunk"),
    ],
)
def test_a_chunk_is_as_the_document_says(
    document: Document, http: httpx2.Client, path: str, body: dict[str, Any], name: str
) -> None:
    told = document.data["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert f"A {name} " in told["properties"]["data"]["description"]
    usage = {"include_usage": True, "continuous_usage_stats": True}
    response = http.post(path, json={**body, "stream": True, "stream_options": usage})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = list(events(response))
    assert len(chunks) > 3
    for chunk in chunks:
        document.check(chunk, name)


def test_an_unhealthy_server_answers_as_the_document_says(
    document: Document, http: httpx2.Client, server: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.front.service, "draining", True)
    for response in (http.get("/ready"), http.post("/v1/completions", json=PROMPT)):
        assert response.status_code == 503
        document.check_answer(response)
