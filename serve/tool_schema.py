"""The JSON schema that forces a model to call a tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from phalanx.errors import RequestError

_DATA = frozenset({"const", "enum", "default", "examples"})  # keywords whose values are no schemas
_NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"})


def constrained_schema(
    tools: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any], parallel: bool = True
) -> dict[str, Any]:
    """The schema of what a model may write: a list of calls for `required`, one call for a named function.

    A call is `{"name": ..., "parameters": {...}}`; the form `tool_calls.JSON` reads it. tools, tool_choice: as in
    OpenAI's chat completions. parallel: whether there may be several calls. RequestError for a name that is no tool's,
    and for parameters that are no schema of an object.
    """
    functions = [tool["function"] for tool in tools]
    names = [function["name"] for function in functions]
    if tool_choice == "required" and functions:
        calls = [_call(each, f"#/items/anyOf/{index}") for index, each in enumerate(functions)]
        schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1}
        return schema if parallel else {**schema, "maxItems": 1}
    wanted = tool_choice if isinstance(tool_choice, str) else tool_choice["function"]["name"]
    if wanted not in names or isinstance(tool_choice, str):
        raise RequestError(f"tool_choice is `{wanted}`; the request's tools are: {', '.join(names) or 'none'}")
    return _call(functions[names.index(wanted)], "#")


def _call(function: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The schema of one call. place: where it will be in the whole, as a JSON pointer."""
    name = function["name"]
    parameters = function.get("parameters") or {}
    kind = parameters.get("type", "object") if isinstance(parameters, Mapping) else None
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestError(f"the parameters of tool `{name}` must be a JSON schema of type object")
    try:
        moved = _moved(parameters, f"{place}/properties/parameters")
    except RecursionError:
        raise RequestError(f"the parameters of tool `{name}` are nested too deeply") from None
    # An `$id` would make its references count from there.
    moved = {key: value for key, value in moved.items() if key not in ("$id", "$schema")}
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {**moved, "type": "object"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to its own parts (`#`, `#/...`) hold where it is a part of another, at `place`."""
    if isinstance(schema, list):
        return [_moved(each, place) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[key] = place + value[1:]
        elif key in _NAMED_SCHEMAS and isinstance(value, Mapping):
            moved[key] = {name: _moved(each, place) for name, each in value.items()}
        else:
            moved[key] = value if key in _DATA else _moved(value, place)
    return moved
