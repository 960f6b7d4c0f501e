"""The forms in which models write tool calls, and which of them a model was trained on."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from phalanx.errors import RequestError
from phalanx.models.chat import compile_template
from phalanx.serve import tool_grammars as grammars
from phalanx.serve.tool_parser import ToolParser
from phalanx.serve.tool_reader import Reading

_ALPHANUMERIC = string.ascii_letters + string.digits


class ToolCall(NamedTuple):
    """A call that a model has written. arguments: JSON text, as the model wrote it: it may be cut off or invalid."""

    id: str
    name: str
    arguments: str


class Parsed(NamedTuple):
    """A whole completion: content for the user, and calls."""

    content: str
    tool_calls: tuple[ToolCall, ...]


def openai_id() -> str:
    """A new id as OpenAI's are: `call_` and 24 hexadecimal digits."""
    return f"call_{secrets.token_hex(12)}"


def mistral_id() -> str:
    """A new id as Mistral's templates insist on: 9 letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One form of tool calls.

    read_calls, marks, bare, new_id: as `ToolParser` takes them. inner_marks: those that stand only within or after
    calls.
    """

    name: str
    read_calls: Callable[[ToolParser], Reading[None]]
    marks: tuple[str, ...] = ()
    inner_marks: tuple[str, ...] = ()
    bare: str = ""
    new_id: Callable[[], str] = openai_id

    def needs_special_tokens(self, special_tokens: Collection[str]) -> bool:
        """Whether the text must be decoded with special tokens shown. special_tokens: the texts of the model's own."""
        return not {*self.marks, *self.inner_marks}.isdisjoint(special_tokens)

    def parser(self, special_tokens: Collection[str] = ()) -> ToolParser:
        """A parser for one completion.

        special_tokens: the texts of the model's own, where the text is decoded with them shown: those that are no
        marks of this form are left out of content and arguments. A text that only looks like one goes as well, so that
        tokens that cannot be there, since the completion stops before them, had better not be among them.
        """
        hidden = frozenset(special_tokens).difference(self.marks, self.inner_marks)
        return ToolParser(self.read_calls, self.marks, self.bare, self.new_id, hidden)

    def parse(self, text: str, special_tokens: Collection[str] = ()) -> Parsed:
        """A whole completion at once."""
        parser = self.parser(special_tokens)
        steps = (parser.push(text), parser.finish())
        calls: list[ToolCall] = []
        for delta in (delta for step in steps for delta in step.deltas):
            if delta.id is not None and delta.name is not None:
                calls.append(ToolCall(delta.id, delta.name, delta.arguments))
            else:
                calls[-1] = calls[-1]._replace(arguments=calls[-1].arguments + delta.arguments)
        return Parsed("".join(step.content for step in steps), tuple(calls))

    def forced(self) -> ToolFormat:
        """The form that `constrained_schema` forces upon any model, with ids as this model's template wants them."""
        return replace(JSON, new_id=self.new_id)


_STRICT_JSON = partial(grammars.json_calls, strict=True)
JSON = ToolFormat("json", _STRICT_JSON, bare="{[")  # what `constrained_schema` allows

FORMATS: dict[str, ToolFormat] = {
    each.name: each
    for each in (
        ToolFormat("hermes", grammars.hermes, (grammars.TOOL_CALL,), (grammars.TOOL_CALL_END,)),
        # Source: the templates of Llama 3.1, 3.2 and 3.3, which mark the calls of built-in tools alone.
        ToolFormat("llama", _STRICT_JSON, (grammars.PYTHON_TAG,), bare="{["),
        ToolFormat(
            "mistral", grammars.mistral, (grammars.TOOL_CALLS,), (grammars.CALL_ID, grammars.ARGS), new_id=mistral_id
        ),
        ToolFormat(
            "pythonic",
            grammars.pythonic,
            (grammars.PYTHON_TAG, grammars.PYTHON_START),
            (grammars.PYTHON_END,),
            bare="[",
        ),
    )
}

# What a template says of the form, the surest sign first; None for forms that are not read.
_SIGNS: tuple[tuple[str, str | None], ...] = (
    ("<function=", None),  # Qwen 3 Coder: XML within `<tool_call>`
    ("<arg_key>", None),  # GLM 4.5: likewise
    (grammars.TOOL_CALLS, "mistral"),
    (grammars.TOOL_CALL, "hermes"),
    ("[func_name1(", "pythonic"),
    (grammars.PYTHON_TAG, "llama"),
    ('"parameters": dictionary of argument name', "llama"),
)


def parser_for(chat_template: str | None, name: str = "auto") -> ToolFormat | None:
    """The form in which a model writes tool calls; None where none is known.

    name: one of FORMATS, `none`, or `auto` for what the template shows. RequestError for another.
    """
    if name in FORMATS:
        return FORMATS[name]
    if name == "none":
        return None
    if name != "auto":
        raise RequestError(f"the form of tool calls is `{name}`; allowed: auto, {', '.join(FORMATS)}, none")
    found = next((form for sign, form in _SIGNS if sign in (chat_template or "")), None)
    return None if found is None else FORMATS[found]


def knows_tools(chat_template: str | None) -> bool:
    """Whether a chat template has a place for `tools`. ModelError where it is not valid Jinja."""
    from jinja2.meta import find_undeclared_variables

    if chat_template is None:
        return False
    return "tools" in find_undeclared_variables(compile_template(chat_template).environment.parse(chat_template))
