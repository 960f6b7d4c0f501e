"""The schema that forces a call: it allows what the tools' own schemas allow, wherever their references point."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import Any

import llguidance
import pytest

from phalanx.errors import RequestError
from phalanx.serve.tool_calls import JSON
from phalanx.serve.tool_schema import constrained_schema

Allows = Callable[[dict[str, Any], str], bool]


def tool(name: str, parameters: Any = ...) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name} | ({} if parameters is ... else {"parameters": parameters})}


def record(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}


POINT = record("x", x={"type": "integer"}, next={"$ref": "#/$defs/point"})
TOOLS = [
    tool("free"),
    tool("empty", record("none", none={"enum": [{"$ref": "#/data"}]})),
    tool(
        "line", {**record("from", **{"from": {"$ref": "#/$defs/point"}}), "$defs": {"point": POINT}, "$id": "http://a"}
    ),
    tool("tree", record("leaf", leaf={"type": "string"}, default={"$ref": "#"})),
    tool("odd", record("$ref", **{"$ref": {"type": "integer"}})),
    tool(
        "either",
        {"anyOf": [record("a", a={"type": "string"}), {"$ref": "#/definitions/b"}], "definitions": {"b": POINT}},
    ),
]
TOOLS[-1]["function"]["parameters"]["$defs"] = {"point": POINT}


@pytest.fixture(scope="module")
def allows() -> Allows:
    tokenizer = llguidance.LLTokenizer("byte")

    def allows(schema: dict[str, Any], text: str) -> bool:
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_json_schema(schema))
        assert not matcher.get_error()
        tokens = tokenizer.tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    return allows


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("free", '{"any": [1]}', True),
        ("free", "1", False),
        ("empty", '{"none": {"$ref": "#/data"}}', True),
        ("line", '{"from": {"x": 1, "next": {"x": 2}}}', True),
        ("line", '{"from": {"x": 1, "next": {"x": "2"}}}', False),
        ("tree", '{"leaf": "a", "default": {"leaf": "b"}}', True),
        ("tree", '{"leaf": "a", "default": {}}', False),
        ("odd", '{"$ref": 1}', True),
        ("odd", '{"$ref": "#"}', False),
        ("either", '{"a": "b"}', True),
        ("either", '{"x": 1}', True),
        ("either", '{"x": "1"}', False),
        ("unknown", "{}", False),
    ],
)
def test_a_required_call_has_a_tools_name_and_parameters(
    allows: Allows, name: str, arguments: str, expected: bool
) -> None:
    call = f'{{"name": "{name}", "parameters": {arguments}}}'
    assert allows(constrained_schema(TOOLS, "required"), f"[{call}]") is expected
    if expected:
        assert [(found.name, found.arguments) for found in JSON.parse(f"[{call}]").tool_calls] == [(name, arguments)]
    if name != "unknown":
        assert allows(constrained_schema(TOOLS, tool(name)), call) is expected


def test_a_named_function_is_the_only_one_allowed(allows: Allows) -> None:
    assert not allows(constrained_schema(TOOLS, tool("free")), '{"name": "tree", "parameters": {"leaf": "a"}}')


def test_several_required_calls_are_allowed_only_in_parallel(allows: Allows) -> None:
    call = '{"name": "free", "parameters": {}}'
    assert allows(constrained_schema(TOOLS, "required"), f"[{call}, {call}]")
    assert not allows(constrained_schema(TOOLS, "required", parallel=False), f"[{call}, {call}]")
    assert allows(constrained_schema(TOOLS, "required", parallel=False), f"[{call}]")
    assert not allows(constrained_schema(TOOLS, "required"), "[]")


def test_a_call_has_nothing_beside_its_name_and_parameters(allows: Allows) -> None:
    call = '{"name": "free", "parameters": {}, "more": 1}'
    assert not allows(constrained_schema(TOOLS, tool("free")), call)


def test_what_is_no_reference_is_left_for_others_to_judge() -> None:
    schema = constrained_schema([tool("f", {"properties": {"a": {"$ref": 3}}})], tool("f"))
    assert schema["properties"]["parameters"]["properties"] == {"a": {"$ref": 3}}


def test_the_tools_of_the_request_are_not_changed() -> None:
    before = json.dumps(TOOLS)
    constrained_schema(TOOLS, "required")
    assert json.dumps(TOOLS) == before


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (TOOLS[:2], tool("nope"), "`nope`; the request's tools are: free, empty"),
        ([], "required", "`required`; the request's tools are: none"),
        ([tool("auto")], "auto", "`auto`"),
        ([tool("f", {"type": "string"})], "required", "tool `f` must be a JSON schema of type object"),
        ([tool("f", [1])], "required", "tool `f` must be a JSON schema of type object"),
    ],
)
def test_choices_and_parameters_that_cannot_be_forced_are_refused(
    tools: list[dict[str, Any]], choice: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        constrained_schema(tools, choice)


def test_parameters_nested_too_deeply_are_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(sys.getrecursionlimit()):
        deep = {"items": deep}
    with pytest.raises(RequestError, match="nested too deeply"):
        constrained_schema([tool("f", deep)], "required")
