"""What cannot be compiled, or would take too much: refused with cause and remedy, and nothing else is hurt."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from tests.engine.vocabularies import TINY_VOCAB, sentencepiece, tokens_in

from phalanx.engine.grammar import MAX_SOURCE_BYTES, Grammars
from phalanx.engine.grammar_compiler import GrammarTrials
from phalanx.errors import RequestError
from phalanx.models.resolve import ModelSource


@pytest.fixture(scope="module")
def grammars(smollm2: ModelSource) -> Iterator[Grammars]:
    made = Grammars(smollm2.tokenizer(), 49152, [2])
    yield made
    made.close()


def chain(length: int) -> dict[str, Any]:
    """A schema that is a reference to a reference to ..."""
    names = {f"n{index}": {"$ref": f"#/$defs/n{index + 1}"} for index in range(length)}
    return {"$ref": "#/$defs/n0", "$defs": {**names, f"n{length}": {}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


BAD_SCHEMAS: dict[str, tuple[Any, str]] = {
    "minLength over maxLength": (
        {"type": "string", "minLength": 5, "maxLength": 3},
        r"minLength \(5\) is greater than maxLength \(3\); no text can satisfy it",
    ),
    "nothing to choose from": ({"enum": []}, "no text can satisfy it"),
    "a required property of none": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'a' is unsat"),
    "a reference to itself": ({"$ref": "#"}, "nothing may come next; no text can satisfy it"),
    "required in itself": (
        {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
        "no text would ever end",
    ),
    "a reference to nothing": ({"$ref": "#/$defs/x"}, "'/[$]defs/x' does not exist"),
    "a reference to elsewhere": ({"$ref": "https://example.com/s.json"}, "example.com/s.json' is not present"),
    "a keyword not supported": (
        {"type": "array", "uniqueItems": True},
        r'Unimplemented keys: \["uniqueItems"\]; leave that out, or .*"lenient": true',
    ),
    "a format not known": ({"type": "string", "format": "zip"}, "Unknown format: zip; leave that out"),
    "a type not known": ({"type": "text"}, "Invalid type: text"),
    "not a schema inside": ({"type": "array", "items": 3}, "must be an object or boolean"),
    "a bad pattern": ({"type": "string", "pattern": "["}, "unclosed character class"),
    "a surrogate": ({"const": "\ud800"}, "hex escape"),
    "not an object": ([1], r"is an object or a boolean, found \[1\]"),
    "not JSON": ({"const": float("nan")}, "is not JSON: .*float"),
    "too long": ({"enum": ["x" * MAX_SOURCE_BYTES]}, f"allowed: {MAX_SOURCE_BYTES:,}. Give a shorter one"),
    "too deep": (nested(130), "recursion limit.*less nesting"),
    "far too deep": (nested(5000), "nested too deeply"),
    "minutes to compile": ({"type": "integer", "multipleOf": 9999991}, r"takes more than 0\.25 s to compile; make it"),
    "too many properties": (
        {"type": "object", "properties": {f"{number}": {} for number in range(5000)}},
        r"takes more than 0\.25 s to compile",
    ),
    "the whole stack": (chain(1500), "takes more than 1024 MiB of memory or 2 MiB of stack; make it smaller"),
}


@pytest.mark.parametrize(("schema", "message"), BAD_SCHEMAS.values(), ids=BAD_SCHEMAS)
def test_a_schema_that_cannot_be_followed_is_refused_with_cause_and_remedy(
    grammars: Grammars, schema: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=f"JSON schema .*{message}"):
        grammars.json_schema(schema)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("[", "unclosed character class"),
        ("a{5,2}", "invalid repetition count range"),
        ("(?=a)b", "look-around.* not supported; write it without"),
        (r"\bword\b", "lookarounds not supported.*write it without"),
        (r"(a)\1", "backreferences are not supported; write it without"),
        ("a\\", "ends with a backslash that escapes nothing"),
        ("\ud800", "not valid Unicode: a lone surrogate at character 0"),
        (r"[^\s\S]", "nothing may come next; no text can satisfy it"),
        ("(" * 300 + "a" + ")" * 300, r"nested parentheses/brackets \(250\)"),
        ("(((.{1,100}){1,100}){1,100}){1,100}", "too many expressions constructed; make it smaller"),
        ("a?" * 32_000, r"takes more than 0\.25 s to compile; make it smaller"),
        ("a" * (MAX_SOURCE_BYTES + 1), "takes 65,537 bytes; allowed: 65,536"),
    ],
    ids=lambda value: value[:20],
)
def test_a_regular_expression_that_cannot_be_followed_is_refused_with_cause_and_remedy(
    grammars: Grammars, pattern: str, message: str
) -> None:
    with pytest.raises(RequestError, match=f"regular expression .*{message}"):
        grammars.regex(pattern)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no start rule"),
        ("start: other", 'unknown name: "other"'),
        ('start: start "a"', "nothing may come next"),
        ("start: r0\n" + "\n".join(f"r{n}: r{n + 1}" for n in range(4000)) + '\nr4000: "a"', "MiB of stack"),
    ],
    ids=["empty", "unknown", "endless", "stack"],
)
def test_a_grammar_that_cannot_be_followed_is_refused(grammars: Grammars, text: str, message: str) -> None:
    with pytest.raises(RequestError, match=f"grammar cannot be followed: .*{message}"):
        grammars.grammar(text)


@pytest.mark.parametrize("choices", [[], [""], ["a", ""], ["a", 1], "text"])
def test_choices_that_are_none_are_refused(grammars: Grammars, choices: Any) -> None:
    with pytest.raises(RequestError, match="allowed: a list of one text or more, none empty"):
        grammars.choice(choices)


@pytest.mark.parametrize("pattern", ["(a|b)*a(a|b){30}", "(x{1000}){1000}", "(.*a){20}b", "((a{1,99}){1,99}){1,99}"])
def test_a_regular_expression_of_very_many_states_is_followed_or_refused_but_never_waited_for(
    grammars: Grammars, pattern: str
) -> None:
    chance = random.Random(0)
    try:
        guide = grammars.regex(pattern)()
        for _ in range(50):
            guide.accept(chance.choice(tokens_in(guide.allowed())))
    except RequestError as error:
        assert "make it smaller" in str(error)


def test_a_text_that_grows_too_complex_ends_with_cause_and_remedy(grammars: Grammars) -> None:
    guide = grammars.regex("(.{0,200}a.{0,200}){20}")()
    chance = random.Random(0)
    with pytest.raises(RequestError, match=r"grammar of this text.* cannot be followed: too many .*; make it smaller"):
        for _ in range(400):
            guide.accept(chance.choice(tokens_in(guide.allowed())))


def test_a_refusal_is_kept_too(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    refusal = GrammarTrials.refusal

    def counted(trials: Any, grammar: str, schema: str | None = None) -> str | None:
        tried.append(grammar)
        return refusal(trials, grammar, schema)

    monkeypatch.setattr(GrammarTrials, "refusal", counted)
    for _ in range(3):
        with pytest.raises(RequestError):
            grammars.regex("again[")
    assert len(tried) == 1


def test_compiling_goes_on_after_a_trial_has_crashed(grammars: Grammars) -> None:
    with pytest.raises(RequestError, match="stack"):
        grammars.json_schema(chain(1501))
    assert tokens_in(grammars.regex("after[a-b]")().allowed())


def trial_processes() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if "phalanx.engine.grammar_compiler" in each.cmdline()]


def test_the_process_that_tries_grammars_ends_with_close_and_comes_again_when_it_is_needed() -> None:
    before = set(trial_processes())
    made = Grammars(sentencepiece(), TINY_VOCAB, [2])
    assert set(trial_processes()) == before
    made.prepare()
    make = made.regex("a")
    (process,) = set(trial_processes()) - before
    made.close()
    assert not process.is_running()
    assert make().allowed()
    made.regex("b")
    (process,) = set(trial_processes()) - before
    process.send_signal(signal.SIGKILL)
    process.wait()
    made.regex("c")
    made.close()
    assert set(trial_processes()) == before
