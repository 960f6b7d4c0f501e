"""Schemas as text, and which of them have no finite text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from phalanx.engine.json_schema import WHITESPACE_PATTERN, can_end, schema_text
from phalanx.errors import RequestError


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"whitespace_pattern": WHITESPACE_PATTERN}),
        ({"x-guidance": {"lenient": True}}, {"lenient": True, "whitespace_pattern": WHITESPACE_PATTERN}),
        ({"x-guidance": {"whitespace_pattern": " ?"}}, {"whitespace_pattern": " ?"}),
        ({"x-guidance": {"whitespace_flexible": True}}, {"whitespace_flexible": True}),
    ],
)
def test_white_space_is_ours_where_the_schema_says_nothing_of_it(options: Any, expected: Any) -> None:
    schema = {"type": "object", **options}
    assert json.loads(schema_text(schema)) == {"type": "object", "x-guidance": expected}


def test_the_order_of_properties_is_kept() -> None:
    text = schema_text({"properties": {"b": {}, "a": {}}})
    assert text.index('"b"') < text.index('"a"')


@pytest.mark.parametrize("schema", [[1], None, 1, "object"])
def test_what_is_no_schema_is_refused(schema: Any) -> None:
    with pytest.raises(RequestError, match="a JSON schema is an object or a boolean, found"):
        schema_text(schema)


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        (True, True),
        ({"$ref": "#"}, False),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, True),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, False),
        ({"type": "object", "additionalProperties": {"$ref": "#"}, "required": ["a"]}, False),
        ({"type": ["object", "null"], "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, True),
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, False),
        ({"type": "array", "prefixItems": [{"$ref": "#"}, {}], "minItems": 1}, False),
        ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 1}, True),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, True),
        ({"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}, False),
        ({"allOf": [{"$ref": "#"}, {"type": "null"}]}, False),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"$ref": "#/$defs/c%20d"}, "c d": {"type": "null"}}}, True),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, False),
        ({"$ref": "#/anyOf/1", "anyOf": [{}, {"type": "null"}]}, True),
        ({"$ref": "#name"}, True),
    ],
)
def test_whether_a_text_of_a_schema_can_end(schema: Any, ends: bool) -> None:
    assert can_end(schema) == ends
