"""How models write tool calls: a grammar for each form, which reads what follows the form's mark."""

from __future__ import annotations

import json
import re

from phalanx.serve.tool_parser import SPACE, ToolParser
from phalanx.serve.tool_python import python_call
from phalanx.serve.tool_reader import PYTHON_MARKS, Broken, Reading

TOOL_CALL, TOOL_CALL_END = "<tool_call>", "</tool_call>"
TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
PYTHON_TAG, PYTHON_START, PYTHON_END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"

_OPENING = re.compile(r"[\s\[]+")
_BETWEEN_CALLS = re.compile(r"[\s,;\]}]+")  # a closing bracket too many is a slip that models make
_BETWEEN_MEMBERS = re.compile(r"[\s,]+")
_SCALAR = re.compile(r'[^\s,:"\[\]{}]+')
_NAME = re.compile(r"[\w.-]+")
_ARGUMENTS = frozenset({"arguments", "parameters"})
_BESIDES = _ARGUMENTS | {"id", "type"}
MISTRAL_ID = re.compile(r"[0-9A-Za-z]{9}")


def json_calls(parser: ToolParser, strict: bool = False) -> Reading[None]:
    """`{"name": ..., "arguments": {...}}`, or `parameters`: one or several, in a list or not.

    strict: for text that no mark announces, any JSON perhaps: the arguments must be there, and nothing unheard of.
    """
    reader = parser.reader
    yield from reader.run(_OPENING)
    if (yield from reader.peek()) != "{":
        raise Broken
    while (yield from reader.peek()) == "{":
        yield from _json_call(parser, strict)
        yield from reader.run(_BETWEEN_CALLS)


def hermes(parser: ToolParser) -> Reading[None]:
    """`{"name": ..., "arguments": {...}}` and `</tool_call>`. Source: the templates of Hermes 2 Pro, Qwen 2.5, Qwen 3.

    SmolLM2 was trained on a list of such objects between the same marks.
    """
    yield from json_calls(parser)
    if (yield from parser.reader.literal(TOOL_CALL_END)):
        parser.reader.drop()


def mistral(parser: ToolParser) -> Reading[None]:
    """`[{"name": ..., "arguments": {...}}]`, or `name[CALL_ID]id[ARGS]{...}` where the id may be missing.

    Source: mistral-common's tokenizers up to version 7, and 11 and 13.
    """
    reader = parser.reader
    yield from reader.run(SPACE)
    if (yield from reader.peek()) in ("[", "{"):
        yield from json_calls(parser)
        return
    name = yield from reader.run(_NAME)
    call_id = ""
    if (yield from reader.literal(CALL_ID)):
        call_id = yield from reader.run(_NAME)
    yield from reader.literal(ARGS)
    yield from reader.run(SPACE)
    if not name or (yield from reader.peek()) != "{":
        raise Broken
    parser.begin_call(name, call_id if MISTRAL_ID.fullmatch(call_id) else None)
    yield from reader.balanced(parser.add_arguments)
    parser.end_call()


def pythonic(parser: ToolParser) -> Reading[None]:
    """`[f(a=1), g(b="x")]`, each call as a whole. Source: Meta's prompt formats for Llama 3.2 and Llama 4."""
    reader = parser.reader
    yield from reader.run(SPACE)
    if not (yield from reader.literal("[")):
        raise Broken
    while True:
        yield from reader.run(SPACE)
        pieces = [(yield from reader.run(_NAME))]
        if not pieces[0] or (yield from reader.peek()) != "(":
            raise Broken
        yield from reader.balanced(pieces.append, PYTHON_MARKS)
        name, arguments = python_call("".join(pieces))
        yield from reader.run(SPACE)
        following = yield from reader.peek()
        if following not in ("", ",", "]"):
            raise Broken
        parser.begin_call(name)
        parser.add_arguments(arguments)
        parser.end_call()
        if following != ",":
            break
        reader.take(1)
    if (yield from reader.literal("]")):
        yield from reader.run(SPACE)
        yield from reader.literal(PYTHON_END)
        reader.drop()


def _json_call(parser: ToolParser, strict: bool) -> Reading[None]:
    """One object. The call begins once its name and the beginning of its arguments were read, in whichever order."""
    reader = parser.reader
    name = None
    early: list[str] = []  # arguments that came before the name
    reader.take(1)
    while (key := (yield from _key(parser))) is not None:
        head = yield from reader.peek()
        if parser.in_call:
            yield from _skip(parser)
        elif key == "name":
            name = yield from _name(parser)
        elif key in _ARGUMENTS and head == "{":
            if name is not None:
                parser.begin_call(name)
            early.clear()
            yield from reader.balanced(parser.add_arguments if parser.in_call else early.append)
        elif (key in _ARGUMENTS and head != "n") or (strict and key not in _BESIDES):
            raise Broken
        else:
            yield from _skip(parser)  # `null`, or a member such as `id`
        if name is not None and early and not parser.in_call:
            parser.begin_call(name)
            parser.add_arguments("".join(early))
    if not parser.in_call:
        if name is None or strict:
            raise Broken
        parser.begin_call(name)
        parser.add_arguments("{}")
    parser.end_call()


def _key(parser: ToolParser) -> Reading[str | None]:
    """Up to the value of an object's next member; None past the object's end."""
    reader = parser.reader
    yield from reader.run(_BETWEEN_MEMBERS)
    if (yield from reader.literal("}")):
        return None
    if (yield from reader.peek()) != '"':
        if parser.in_call:
            return None  # a closing bracket too few
        raise Broken
    key = yield from _string(parser)
    yield from reader.run(SPACE)
    if not (yield from reader.literal(":")):
        raise Broken
    yield from reader.run(SPACE)
    return key


def _string(parser: ToolParser) -> Reading[str]:
    pieces: list[str] = []
    yield from parser.reader.balanced(pieces.append)
    try:
        return str(json.loads("".join(pieces)))
    except ValueError:
        raise Broken from None


def _name(parser: ToolParser) -> Reading[str]:
    if (yield from parser.reader.peek()) != '"':
        raise Broken
    name = yield from _string(parser)
    if not name.strip() or not name.isprintable():  # half a surrogate pair could not even be sent
        raise Broken
    return name


def _skip(parser: ToolParser) -> Reading[None]:
    """Reads any value."""
    head = yield from parser.reader.peek()
    if head and head in '"{[':
        yield from parser.reader.balanced(lambda _: None)
    elif not (yield from parser.reader.run(_SCALAR)):
        raise Broken
