"""A call in Python's syntax, as data: it is parsed and never run."""

from __future__ import annotations

import ast
import json
import warnings
from typing import Any

from phalanx.serve.tool_reader import Broken

_JSON_NAMES = {"true": True, "false": False, "null": None}


def python_call(text: str) -> tuple[str, str]:
    """Name and arguments, as JSON text, of `f(a=1, b=["x"])`. Broken for anything but keywords with literal values.

    Literals are numbers, strings, lists, tuples, dicts with string keys, True, False, None, and JSON's words for these.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python has opinions on the model's escape sequences
            call = ast.parse(text, mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, (ast.Name, ast.Attribute)) or call.args:
            raise Broken
        values = {_keyword(each): _value(each.value) for each in call.keywords}
        arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        arguments.encode()  # half a surrogate pair could not be sent
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Broken from None
    return text[: text.index("(")], arguments


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:
        raise Broken
    return keyword.arg


def _value(node: ast.expr | None) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):  # a bool is an int
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            return [_value(each) for each in elements]
        case ast.Dict(keys=keys, values=values):
            return {_key(key): _value(value) for key, value in zip(keys, values, strict=True)}
        case ast.Name(id=word) if word in _JSON_NAMES:
            return _JSON_NAMES[word]
    raise Broken


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise Broken
