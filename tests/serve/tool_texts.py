"""Texts of models that call tools, and ways to read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hypothesis import strategies as st

from phalanx.serve.tool_calls import FORMATS, JSON, Parsed, ToolFormat
from phalanx.serve.tool_parser import ToolDelta

HERMES, LLAMA, MISTRAL, PYTHONIC = (FORMATS[name] for name in ("hermes", "llama", "mistral", "pythonic"))
ALL_FORMATS = (*FORMATS.values(), JSON)


class Example(NamedTuple):
    """calls: name and arguments of each."""

    format: ToolFormat
    text: str
    content: str
    calls: list[tuple[str, str]]


def _example(form: str, text: str, content: str = "", calls: Any = (), unchanged: bool = False) -> Example:
    called = [next(iter(call.items())) for call in calls]
    return Example({**FORMATS, "json": JSON}[form], text, text if unchanged else content, called)


_ROWS = yaml.safe_load((Path(__file__).parent / "tool_calls.yaml").read_text(encoding="utf-8"))
EXAMPLES = {f"{row['form']}: {row.pop('title')}": _example(**row) for row in _ROWS}

_MARKS = ("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "</s>", "<|eom_id|>")
_BEGINNINGS = ("<tool", "<tool_call", "[TOOL", "<|python", "{", "}", "[f(", "]", " ", "\n", ";", ",", '"', "\\")
FRAGMENTS = st.one_of(
    st.sampled_from([example.text for example in EXAMPLES.values()]),
    st.sampled_from([*_MARKS, *_BEGINNINGS]),
    st.text(max_size=8),
)


def named(format_: ToolFormat) -> ToolFormat:
    """The same with one id for every call, so that two parsings can be compared."""
    return replace(format_, new_id=lambda: "id")


def in_pieces(format_: ToolFormat, pieces: Iterable[str], special: Sequence[str] = ()) -> Parsed:
    """What a client puts together from a stream."""
    parser = format_.parser(special)
    content, deltas = "", []
    for step in (*map(parser.push, pieces), parser.finish()):
        content += step.content
        deltas += step.deltas
    return Parsed(content, tuple(_joined(deltas)))


def _joined(deltas: Iterable[ToolDelta]) -> list[Any]:
    calls: list[list[str]] = []
    for delta in deltas:
        if delta.index == len(calls):
            assert delta.id is not None
            assert delta.name is not None
            calls.append([delta.id, delta.name, ""])
        else:
            assert (delta.id, delta.name, delta.index) == (None, None, len(calls) - 1)
        calls[-1][2] += delta.arguments
    return [tuple(call) for call in calls]


def cut(text: str, places: Iterable[int]) -> list[str]:
    bounds = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(bounds)]
