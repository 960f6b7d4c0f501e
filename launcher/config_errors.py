"""From what pydantic says of a configuration to what a person needs to mend it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from phalanx.errors import Problem
from phalanx.launcher.schema import Config
from phalanx.launcher.yaml_document import KeyPath, YamlDocument, dotted

_MAX_FOUND = 80


def translate(
    error: Mapping[str, Any], data: Mapping[str, Any], document: YamlDocument, overridden: Sequence[KeyPath]
) -> Problem:
    """The problem behind one of pydantic's error records."""
    path: KeyPath = tuple(error["loc"])
    kind = error["type"]
    found: object = error["input"]
    allowed = allowed_at(path)
    message = _MESSAGES.get(kind, error["msg"][:1].lower() + error["msg"][1:])
    suggestion = None
    if kind == "extra_forbidden":
        keys = _keys_at(path[:-1])
        message, allowed, found = "unknown key", ", ".join(keys) or "nothing yet", path[-1]
        suggestion = _key_suggestion(path, keys)
    elif kind == "invalid_key":
        allowed = ", ".join(_keys_at(path[:-1])) or None
    elif kind == "missing":
        suggestion = "model: smollm2-135m" if path[0] == "model" else None
        return problem_at(path, "is missing", document, overridden, allowed=allowed, suggestion=suggestion)
    elif kind in ("literal_error", "choice"):
        suggestion = _closest(str(found), _choices_at(path) or error["ctx"]["choices"])
    elif kind in ("int_type", "float_type", "bool_type") and isinstance(found, str):
        suggestion, found = _unquoted(found), json.dumps(found, ensure_ascii=False)
    elif kind == "string_type" and found is not None and not isinstance(found, (dict, list)):
        suggestion = "put quotes around it, YAML takes the bare word for something else than text"
    return problem_at(path, message, document, overridden, found=found, allowed=allowed, suggestion=suggestion)


def problem_at(
    path: KeyPath,
    message: str,
    document: YamlDocument,
    overridden: Sequence[KeyPath],
    *,
    found: object = ...,
    allowed: str | None = None,
    suggestion: str | None = None,
) -> Problem:
    """A problem with its line in the file, or a word on `--set` where an override put the value there."""
    shown = None if found is ... else _shown(found)
    is_override = any(path[: len(other)] == other for other in overridden)
    if is_override:
        shown = "from --set" if shown is None else f"{shown} (from --set)"
    return Problem(dotted(path), message, shown, allowed, suggestion, None if is_override else document.line(path))


_MESSAGES = {
    "invalid_key": "a key must be text",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "literal_error": "is not one of the choices",
    "choice": "is not one of the choices",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "model_type": "must be a section, with keys and values",
    "greater_than": "is too small",
    "greater_than_equal": "is too small",
    "less_than": "is too large",
    "less_than_equal": "is too large",
}


def _shown(value: object) -> str:
    """`value` in YAML's own words, cut short."""
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _MAX_FOUND else text[: _MAX_FOUND - 1] + "…"


def _unquoted(text: str) -> str | None:
    try:
        float(text)
    except ValueError:
        is_plain = text.lower() in ("true", "false")
    else:
        is_plain = True
    return f"remove the quotes: {text}" if is_plain else None


def _closest(word: str, choices: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else None


def _key_suggestion(path: KeyPath, keys: Sequence[str]) -> str | None:
    key = str(path[-1])
    near = _closest(key, keys)
    if near is not None:
        return near
    homes = [section for section in Config.model_fields if key in _keys_at((section,))]
    if homes:
        return f"`{key}` belongs to the section `{homes[0]}`"
    everywhere = {name: section for section in Config.model_fields for name in _keys_at((section,))}
    match = difflib.get_close_matches(key.lower(), list(everywhere), n=1, cutoff=0.75)
    return f"did you mean `{everywhere[match[0]]}.{match[0]}`?" if match else None


def allowed_at(path: KeyPath) -> str | None:
    """What the schema allows at `path`, in words."""
    schema = _schema_at(path)
    if schema is None:
        return None
    if "allowed" in schema:
        text = str(schema["allowed"])
    elif "enum" in schema:
        text = ", ".join(map(str, schema["enum"]))
    else:
        text = _TYPES.get(str(schema.get("type")), "")
        if schema.get("type") == "object":
            text += ", ".join(schema.get("properties", {})) or "nothing yet"
        text += _bounds(schema)
    return text + " (or null)" if schema.get("optional") else text or None


_TYPES = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
    "object": "a section with ",
}


def _bounds(schema: Mapping[str, Any]) -> str:
    words = (
        ("minimum", "at least"),
        ("exclusiveMinimum", "above"),
        ("maximum", "at most"),
        ("exclusiveMaximum", "below"),
    )
    bounds = " and ".join(f"{word} {schema[key]:g}" for key, word in words if key in schema)
    return f", {bounds}" if bounds else ""


def _keys_at(path: KeyPath) -> list[str]:
    return list((_schema_at(path) or {}).get("properties", {}))


def _choices_at(path: KeyPath) -> list[str]:
    return list((_schema_at(path) or {}).get("enum", []))


def _schema_at(path: KeyPath) -> dict[str, Any] | None:
    """The JSON schema of the value at `path`, with references followed and `null` folded into `optional`."""
    schema: dict[str, Any] | None = _resolved(_json_schema())
    for key in path:
        if schema is None:
            return None
        inner = schema.get("items") if isinstance(key, int) else schema.get("properties", {}).get(key)
        schema = None if inner is None else _resolved(inner)
    return schema


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        schema = {**_json_schema()["$defs"][schema["$ref"].rpartition("/")[2]], **schema}
    if "anyOf" in schema:
        kinds = [kind for kind in schema["anyOf"] if kind.get("type") != "null"]
        if len(kinds) == 1:
            return {**_resolved(kinds[0]), **schema, "optional": True}
    return schema


@cache
def _json_schema() -> dict[str, Any]:
    return Config.model_json_schema()
