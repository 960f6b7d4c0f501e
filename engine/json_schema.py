"""JSON schemas as a request brings them: what is asked of the white space, and whether a text can ever end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from phalanx.errors import RequestError

# One space, or a new line and what indents it: JSON as models have seen it, compact or pretty-printed. Were any white
# space allowed, a small model could go on with it until it has no tokens left.
WHITESPACE_PATTERN = r" |\n[ \t]{0,32}"


def schema_text(schema: Mapping[str, Any] | bool) -> str:
    """The schema as JSON, with our rule for white space where its own `x-guidance` has none.

    RequestError for what is not JSON, or not an object or a boolean.
    """
    if isinstance(schema, Mapping):
        own = schema.get("x-guidance")
        options = dict(own) if isinstance(own, Mapping) else {}
        if "whitespace_flexible" not in options:
            options.setdefault("whitespace_pattern", WHITESPACE_PATTERN)
        schema = {**schema, "x-guidance": options}
    elif schema is True:
        return schema_text({})
    elif schema is not False:
        raise RequestError(f"a JSON schema is an object or a boolean, found {schema!r:.80}")
    try:
        return json.dumps(schema, allow_nan=False)
    except RecursionError as error:
        raise RequestError("the JSON schema is nested too deeply; define its parts in $defs and name them") from error
    except (TypeError, ValueError) as error:  # what JSON cannot express, such as a set, NaN, or an object inside itself
        raise RequestError(f"the JSON schema is not JSON: {error}") from error


def can_end(schema: Any) -> bool:
    """Whether some finite text satisfies a schema, as far as required properties, items and local `$ref`s go.

    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]} has none: its text never ends.
    """
    references = _references(schema)
    ending: set[str] = set()
    # What ends without any reference first, then what needs only that, and so on: the least fixed point.
    while found := {name for name in references - ending if _ends(_target(schema, name), ending)}:
        ending |= found
    return _ends(schema, ending)


def _references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set[str]().union(*map(_references, node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
    return own.union(*map(_references, node.values()))


def _target(schema: Any, reference: str) -> Any:
    """What a JSON pointer (RFC 6901) names in the schema; True, which anything satisfies, where it is none."""
    if reference != "#" and not reference.startswith("#/"):
        return True
    node = schema
    for part in unquote(reference).split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict):
            node = node.get(key, True)
        elif isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        else:
            return True
    return node


def _ends(node: Any, ending: set[str]) -> bool:
    """Whether a finite text satisfies `node`, where references outside of `ending` have none."""
    if not isinstance(node, dict) or "const" in node or "enum" in node:
        return True
    needed = list(node.get("allOf", ()))
    match node.get("type"):
        case "object" | ["object"]:
            others = node.get("additionalProperties", True)
            needed += [node.get("properties", {}).get(name, others) for name in node.get("required", ())]
        case "array" | ["array"]:
            first, at_least = node.get("prefixItems", []), int(node.get("minItems", 0))
            needed += first[:at_least]
            needed += [node.get("items", True)] if at_least > len(first) else []
    if "$ref" in node and node["$ref"] not in ending:
        return False
    choices = [node[key] for key in ("anyOf", "oneOf") if key in node]
    return all(_ends(each, ending) for each in needed) and all(
        any(_ends(each, ending) for each in choice) for choice in choices
    )
