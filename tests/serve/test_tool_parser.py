"""A completion read while it is being written: in whatever pieces it comes, at once, and without reading it twice."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.tool_texts import (
    ALL_FORMATS,
    EXAMPLES,
    FRAGMENTS,
    HERMES,
    LLAMA,
    MISTRAL,
    PYTHONIC,
    cut,
    in_pieces,
    named,
)

from phalanx.serve.tool_calls import ToolFormat
from phalanx.serve.tool_parser import ToolParser
from phalanx.serve.tool_reader import Reader


def streamed(parser: ToolParser, *pieces: str) -> list[tuple[str, list[str]]]:
    """Content and arguments (after the name, where it is the first piece) that each piece brings out."""
    out = []
    for piece in pieces:
        content, deltas = parser.push(piece)
        out.append((content, [f"{delta.name or ''}{delta.arguments}" for delta in deltas]))
    return out


@pytest.mark.parametrize("example", EXAMPLES)
def test_one_character_at_a_time_gives_the_same_as_the_whole(example: str) -> None:
    format_, text, _, _ = EXAMPLES[example]
    assert in_pieces(named(format_), text) == named(format_).parse(text)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(ALL_FORMATS),
    st.lists(st.tuples(FRAGMENTS, st.integers(0, 200)), max_size=6),
    st.lists(st.integers(min_value=0), max_size=30),
)
def test_where_a_text_is_cut_makes_no_difference(
    format_: ToolFormat, fragments: list[tuple[str, int]], places: list[int]
) -> None:
    text = "".join(fragment[: len(fragment) - dropped] or fragment for fragment, dropped in fragments)
    special = ["</s>", "<|eom_id|>", "<|eom", "[ARGS]"]
    whole = named(format_).parse(text, special)
    assert in_pieces(named(format_), cut(text, places), special) == whole
    assert in_pieces(named(format_), text, special) == whole


def test_content_goes_out_at_once() -> None:
    assert streamed(HERMES.parser(), "Hello", " world", ", <", "b>") == [
        ("Hello", []),
        (" world", []),
        (",", []),
        (" <b>", []),
    ]


@pytest.mark.parametrize(
    ("format_", "beginning", "rest"),
    [(HERMES, "<tool_ca", "ve>"), (MISTRAL, "[TOOL", "S]"), (LLAMA, "<|python", "X"), (PYTHONIC, "<|python_s", "-")],
)
def test_what_may_begin_a_mark_is_held_back_until_it_does_not(format_: ToolFormat, beginning: str, rest: str) -> None:
    assert streamed(format_.parser(), f"So {beginning}", rest) == [("So", []), (f" {beginning}{rest}", [])]


def test_arguments_go_out_as_they_come_once_the_name_is_known() -> None:
    pieces = ['<tool_call>\n{"name": "f', '", "arguments', '": {"a', '": "x', "\\", '"y"', "}}", "\n</tool_call>"]
    arguments = [[], [], ['f{"a'], ['": "x'], ["\\"], ['"y"'], ["}"], []]
    assert streamed(HERMES.parser(), *pieces) == [("", each) for each in arguments]


def test_arguments_that_come_before_the_name_wait_for_it() -> None:
    pieces = ['<tool_call>{"arguments": {"a": 1}', ', "name": "f', '"']
    assert streamed(HERMES.parser(), *pieces) == [("", []), ("", []), ("", ['f{"a": 1}'])]


def test_a_python_call_goes_out_as_a_whole() -> None:
    assert streamed(PYTHONIC.parser(), "[f(a=1", ")", ", g", "()]") == [
        ("", []),
        ("", []),
        ("", ['f{"a": 1}']),
        ("", ["g{}"]),
    ]


def test_an_object_that_can_be_no_call_goes_out_as_soon_as_that_is_known() -> None:
    assert streamed(LLAMA.parser(), '{"answer"', ": ", "42") == [("", []), ("", []), ('{"answer": 42', [])]


def test_id_and_name_come_with_the_first_piece_of_each_call() -> None:
    parser = HERMES.parser()
    deltas = parser.push('<tool_call>{"name": "f", "arguments": {"a"').deltas
    deltas += parser.push(': 1}}</tool_call><tool_call>{"name": "g", "arguments": {}').deltas
    assert [(delta.index, delta.name, delta.arguments) for delta in deltas] == [
        (0, "f", '{"a"'),
        (0, None, ": 1}"),
        (1, "g", "{}"),
    ]
    assert [delta.id is None for delta in deltas] == [False, True, False]


def test_the_parser_counts_the_calls_that_have_begun() -> None:
    parser = HERMES.parser()
    counts = []
    for piece in ("Hi <tool_call>", '{"name": "f", "arguments": ', "{", '}}</tool_call><tool_call>{"name": "g"}'):
        parser.push(piece)
        counts.append(parser.num_calls)
    assert counts == [0, 0, 1, 2]


def test_white_space_at_the_end_is_kept_where_no_call_was_made() -> None:
    parser = HERMES.parser()
    assert streamed(parser, " \n Hi", " \n") == [(" \n Hi", []), ("", [])]
    assert parser.finish().content == " \n"


def num_steps(work: Callable[[], object]) -> int:
    """Calls and lines that Python executes: a count of work which no other load on the machine changes."""
    steps = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal steps
        steps += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return steps


def long_texts(size: int) -> dict[str, tuple[ToolFormat, str]]:
    value = json.dumps({"text": 'x "{" ' * size})
    return {
        "content": (HERMES, "a <b> " * size),
        "white space": (HERMES, "a" + " " * 6 * size),
        "arguments": (HERMES, f'<tool_call>{{"name": "f", "arguments": {value}}}</tool_call>'),
        "arguments before the name": (HERMES, f'<tool_call>{{"arguments": {value}, "name": "f"}}</tool_call>'),
        "no name": (HERMES, f'<tool_call>{{"arguments": {value}}}</tool_call>'),
        "many false marks": (HERMES, "<tool_call> " * size),
        "many calls": (MISTRAL, "[TOOL_CALLS]f[ARGS]{}" * size),
        "never closed": (PYTHONIC, f"[f(a={value}"),
    }


@pytest.mark.parametrize("kind", long_texts(1))
def test_the_work_is_linear_in_the_text(kind: str) -> None:
    def steps(size: int) -> int:
        format_, text = long_texts(size)[kind]
        pieces = cut(text, range(0, len(text), 3))
        return num_steps(lambda: in_pieces(format_, pieces))

    assert steps(400) < 4.5 * steps(100)


@pytest.mark.parametrize("kind", long_texts(1))
def test_no_more_than_a_marks_length_is_looked_at_again(kind: str) -> None:
    format_, text = long_texts(200)[kind]
    parser = format_.parser()
    unread = []
    for character in text:
        parser.push(character)
        unread.append(parser.reader.num_unread)
    assert max(unread) < len("<|python_start|>")


@pytest.mark.parametrize("kind", long_texts(1))
def test_what_is_held_back_is_put_together_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    format_, text = long_texts(200)[kind]
    num_joined = 0
    drop = Reader.drop

    def counting(reader: Reader) -> str:
        nonlocal num_joined
        dropped = drop(reader)
        num_joined += len(dropped)
        return dropped

    monkeypatch.setattr(Reader, "drop", counting)
    in_pieces(format_, text)
    assert num_joined <= 3 * len(text)
