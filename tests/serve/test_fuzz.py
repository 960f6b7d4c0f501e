"""Whatever a body has in it is answered with what it asks for, or with why not: never by a failure, never not at all.

See `fuzzing.py` for how to try far more than CI does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import httpx2
import jsonschema  # type: ignore[import-untyped]
import pytest
import schemathesis
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.generation import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tests.serve.fuzzing import KEY, LIMIT_S, Fuzzed, fuzzed_server, tries

from phalanx.serve.app import GETS, POSTS

HELLO = [{"role": "user", "content": "x"}]
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [5], "max_tokens": 2},
    "/v1/chat/completions": {"messages": HELLO, "max_tokens": 2},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [5]},
}
WANTED: dict[str, type[BaseModel]] = {path: wanted for path, _, wanted, *_ in POSTS}
FIELDS = [(path, field) for path, wanted in WANTED.items() for field in wanted.model_fields]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    with fuzzed_server(tmp_path_factory.mktemp("fuzzed")) as fuzzed:
        yield fuzzed


# ---- by the OpenAPI document ----

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def schema(fuzzed: Fuzzed) -> BaseSchema:
    refused = {"negative_data_rejection": {"expected-statuses": [400, 404, 413]}}
    config = SchemathesisConfig.from_dict({"checks": refused})
    return schemathesis.openapi.from_dict(fuzzed.http.get("/openapi.json").json(), config=config)


@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("path", WANTED)
def test_what_the_document_allows_or_not_is_answered_as_it_says(
    fuzzed: Fuzzed, schema: BaseSchema, path: str, mode: GenerationMode
) -> None:
    checks = [*CHECKS, negative_data_rejection] if mode is GenerationMode.NEGATIVE else CHECKS

    @tries(20)
    @given(schema[path]["POST"].as_strategy(generation_mode=mode))
    def answers(case: schemathesis.Case[Any]) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "tiny"  # any other is all that would be looked at
        response = case.call_and_validate(base_url=fuzzed.server.url, headers=KEY, checks=checks, timeout=LIMIT_S)
        [content_type] = response.headers["content-type"]
        fuzzed.check(response.status_code, content_type, response.text, cut_short=response.stream_cut_short)

    answers()


@pytest.mark.parametrize("path", [path for path, *_ in GETS])
def test_what_is_only_looked_at_is_answered_as_the_document_says(fuzzed: Fuzzed, schema: BaseSchema, path: str) -> None:
    case = schema[path]["GET"].Case()
    case.call_and_validate(base_url=fuzzed.server.url, headers=KEY, checks=CHECKS, timeout=LIMIT_S)


# ---- beyond it ----

NUMBERS = (
    st.integers(-2, 3)
    | st.integers()
    | st.sampled_from([2**31 - 1, 2**31, -(2**31), 2**63 - 1, 2**63, -(2**63), 2**64, 10**400])
    | st.floats()
)
TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    [
        "",
        "\0",
        "\ud800",
        "text",
        "1",
        "true",
        "x" * 5000,
        "{{ x }}",
        "(a*)*b",
        "[",
        "{",
        "\U0010ffff\u202e",
        "<|im_end|>",
    ]
)
PLAIN: list[Any] = [0, 1, -1, 1.5, True, "", "1", "true", [], ["1"], [1.5], {}, {"a": "1"}]
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


def body_schema(schema: BaseSchema, path: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{WANTED[path].__name__}", "components": schema.raw_schema["components"]}


def allowed_values(schema: BaseSchema, path: str, field: str) -> st.SearchStrategy[Any]:
    """What the document allows for one field, by a document of nothing else."""
    document = schema.raw_schema
    described = document["components"]["schemas"][WANTED[path].__name__]["properties"][field]
    body = {"type": "object", "properties": {field: described}, "required": [field], "additionalProperties": False}
    operation = {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "an answer"}},
    }
    narrow = schemathesis.openapi.from_dict({**document, "paths": {path: {"post": operation}}})
    return narrow[path]["POST"].as_strategy().map(lambda case: cast("dict[str, Any]", case.body)[field])


@pytest.mark.parametrize(("path", "field"), FIELDS)
def test_any_value_of_a_field_is_answered(fuzzed: Fuzzed, schema: BaseSchema, path: str, field: str) -> None:
    described = jsonschema.Draft202012Validator(body_schema(schema, path))

    def answers(value: Any) -> None:
        body = {**BASES[path], field: value}
        response = fuzzed.post(path, json.dumps(body).encode())
        if not described.is_valid(body):
            assert response.status_code == 400

    for value in PLAIN:
        answers = example(value)(answers)
    tries(5)(given(VALUES | allowed_values(schema, path, field))(answers))()


@tries(60)
@given(st.sampled_from(sorted(WANTED)), st.data())
def test_any_values_of_many_fields_are_answered(fuzzed: Fuzzed, path: str, data: st.DataObject) -> None:
    fields = data.draw(st.lists(st.sampled_from(sorted(WANTED[path].model_fields)), min_size=2, unique=True))
    fuzzed.post(path, json.dumps({**BASES[path], **{field: data.draw(VALUES) for field in fields}}).encode())


MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "refusal", "extra", "__class__", "items")
ARGUMENTS = TEXTS | VALUES.map(json.dumps) | st.just("[" * 10**5) | st.just("1" * 5000)


@tries(60)
@given(
    st.dictionaries(st.sampled_from(MESSAGE_FIELDS), VALUES, max_size=3),
    st.sampled_from(["system", "user", "assistant", "tool"]),
    ARGUMENTS,
)
def test_any_message_is_answered(fuzzed: Fuzzed, fields: dict[str, Any], role: str, arguments: str) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": role, "content": "", "tool_calls": [call], **fields}
    fuzzed.post("/v1/chat/completions", json.dumps({"messages": [*HELLO, message], "max_tokens": 2}).encode())


@tries(40)
@given(st.dictionaries(TEXTS | st.sampled_from(["self", "messages", "tools", "loop", "range", "kwargs"]), VALUES))
def test_any_variables_of_a_template_are_answered(fuzzed: Fuzzed, variables: dict[str, Any]) -> None:
    body = {**BASES["/v1/chat/completions"], "chat_template_kwargs": variables}
    fuzzed.post("/v1/chat/completions", json.dumps(body).encode())


@tries(40)
@given(
    st.binary(max_size=64) | VALUES.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
)
def test_any_bytes_are_answered(fuzzed: Fuzzed, body: bytes) -> None:
    for path in WANTED:
        assert fuzzed.post(path, body).status_code == 400


GOOD = b'{"prompt": [5], "max_tokens": 2}'


def nested(depth: int, before: bytes, opens: bytes, closes: bytes, after: bytes) -> bytes:
    return before + opens * depth + b"1" + closes * depth + after


@pytest.mark.parametrize("depth", [100, 1000, 10**5])
@pytest.mark.parametrize(
    ("path", "before", "after"),
    [
        ("/v1/completions", b"", b""),
        ("/v1/completions", b'{"prompt": ', b"}"),
        ("/v1/completions", b'{"prompt": [5], "max_tokens": 2, "guided_json": {"a": ', b"}}"),
        ("/v1/completions", b'{"prompt": [5], "max_tokens": 2, "metadata": {"a": ', b"}}"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "", "a": ', b'}], "max_tokens": 2}'),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": ""}], "max_tokens": 2, "chat_template_kwargs": {"a": ',
            b"}}",
        ),
        (
            "/v1/chat/completions",
            b'{"messages": [{"role": "user", "content": ""}], "max_tokens": 2, "tool_choice": "required", '
            b'"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": ',
            b"}}}]}",
        ),
    ],
)
def test_deep_nesting_is_answered(fuzzed: Fuzzed, path: str, before: bytes, after: bytes, depth: int) -> None:
    fuzzed.post(path, nested(depth, before, b"[", b"]", after))
    fuzzed.post(path, nested(depth, before, b'{"a": ', b"}", after))


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b'{"prompt": "a", "prompt": [5], "max_tokens": 9, "max_tokens": 1}', 200, ""),  # the last one counts
        (b"\xef\xbb\xbf" + GOOD, 400, "UTF-8"),
        (GOOD.decode().encode("utf-16"), 400, "UTF-8"),
        (b'{"prompt": "\xff"}', 400, "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', 400, "UTF-8"),
        (b'{"prompt": "\\ud800"}', 400, "JSON"),
        (b'{"prompt": [5], "temperature": NaN}', 400, "temperature"),
        (b'{"prompt": [5], "temperature": -Infinity}', 400, "temperature"),
        (b'{"prompt": [5], "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": [5], "seed": 1' + b"0" * 10**5 + b"}", 400, "JSON"),
        (b'{"prompt": [5], "seed": 1' + b"0" * 100 + b"}", 400, "seed"),
        (GOOD + GOOD, 400, "JSON"),
        (b" " * 10**5 + GOOD, 200, ""),
        (b'{"prompt": [5],' + b",".join(b'"%x": 1' % place for place in range(50000)) + b"}", 400, "50000"),
        (b'{"prompt": [' + b",".join([b"[5]"] * 100000) + b"]}", 400, "at most 2048"),
        (b'{"prompt": [' + b",".join([b"[5]"] * 2048) + b'], "n": 128}', 400, "may run or wait"),
        (b'{"prompt": [5], "logit_bias": {' + b",".join(b'"%d": 1' % i for i in range(50000)) + b"}}", 400, "1024"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else None,
)
def test_an_odd_body_is_answered(fuzzed: Fuzzed, body: bytes, status: int, words: str) -> None:
    response = fuzzed.post("/v1/completions", body)
    assert response.status_code == status
    assert words in response.text


@pytest.mark.parametrize(
    "items",
    [
        b'"content": [' + b",".join([b"1"] * 300000) + b"]",
        b'"content": [' + b",".join([b"{}"] * 200000) + b"]",
        b'"content": [' + b",".join([b'{"type": "text", "text": ""}'] * 30000) + b"]",
        b'"tool_calls": [' + b",".join([b"{}"] * 200000) + b"]",
        b'"content": "", "x": [' + b",".join([b"1"] * 300000) + b"]",
    ],
    ids=lambda items: repr(items[:20]),
)
def test_a_message_of_very_many_parts_is_refused(fuzzed: Fuzzed, items: bytes) -> None:
    response = fuzzed.post("/v1/chat/completions", b'{"messages": [{"role": "user", ' + items + b'}], "max_tokens": 2}')
    assert response.status_code == 400


# ---- what OpenAI's documentation shows ----


def chat(*more: dict[str, Any], **fields: Any) -> tuple[str, dict[str, Any]]:
    return "chat/completions", {"messages": [*HELLO, *more], **fields}


def completion(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "completions", {"prompt": "Say this", **fields}


PLACE = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "unit": {"type": "string", "enum": ["c", "f"]}},
    "required": ["place", "unit"],
    "additionalProperties": False,
}
WEATHER = {"name": "get_weather", "description": "The weather of a place.", "parameters": PLACE, "strict": True}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"place": "Oslo"}'}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        completion(temperature=0),
        completion(prompt=["one", "two"], n=2, stop=["\n", "end"], top_p=0.9, logprobs=2),
        completion(echo=True, best_of=1, user="me", suffix=None, logit_bias={"50": -100}),
        completion(stream=True, stream_options={"include_usage": True}),
        chat({"role": "developer", "content": "Be kind."}),
        chat({"role": "user", "content": [{"type": "text", "text": "Hi"}]}, n=2, seed=7),
        chat(stream=True, max_completion_tokens=5),
        chat(logprobs=True, top_logprobs=2, presence_penalty=0.5, frequency_penalty=-1),
        chat(store=True, metadata={"k": "v"}, service_tier="auto", response_format={"type": "text"}),
        chat(response_format={"type": "json_object"}),
        chat(response_format={"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": PLACE}}),
        chat(
            tools=[{"type": "function", "function": WEATHER}],
            tool_choice={"type": "function", "function": {"name": "get_weather"}},
            parallel_tool_calls=False,
        ),
        chat(
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Rain."},
        ),
    ],
)
def test_requests_as_openai_shows_them_are_served(http: httpx2.Client, path: str, body: dict[str, Any]) -> None:
    limit = {} if "max_completion_tokens" in body else {"max_tokens": 5}
    response = http.post(f"/v1/{path}", json={"model": "tiny", **limit, **body})
    assert response.status_code == 200, response.text
    assert '"choices":' in response.text


# ---- what nobody thought of ----


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_is_told_as_one_and_the_server_goes_on(
    fuzzed: Fuzzed, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def fails(count: int) -> None:
        raise RuntimeError("secret")

    with monkeypatch.context() as patch:
        patch.setattr(fuzzed.server.front.service, "check_count", fails)
        response = fuzzed.http.post("/v1/completions", json={**BASES["/v1/completions"], "stream": stream})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "RuntimeError" in response.text
    assert "secret" not in response.text
    fuzzed.goes_on()
