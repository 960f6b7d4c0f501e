"""Guides for JSON schemas, regular expressions, choices and grammars, over a real vocabulary and a tiny one."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.engine.vocabularies import TINY_VOCAB, follows, sentencepiece, tokens_in

from phalanx.engine.grammar import GrammarGuide, Grammars
from phalanx.engine.grammar_compiler import compile_grammar
from phalanx.engine.guide import Guide
from phalanx.errors import RequestError
from phalanx.models.resolve import ModelSource
from phalanx.models.tokenizer import Tokenizer

VOCAB = 49152
END = (2, 0)  # <|im_end|> and <|endoftext|>
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age"],
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: ModelSource) -> Tokenizer:
    return smollm2.tokenizer()


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tokenizer, VOCAB, END)
    yield made
    made.close()


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    return sentencepiece()


@pytest.fixture(scope="module")
def tiny_grammars(tiny: Tokenizer) -> Iterator[Grammars]:
    made = Grammars(tiny, TINY_VOCAB, [2])
    yield made
    made.close()


def walk(guide: Guide, end: tuple[int, ...], seed: int, most: int = 600) -> list[int]:
    """Any allowed token after another, until one that ends the text, which is left out."""
    chance = random.Random(seed)
    drawn: list[int] = []
    while len(drawn) < most:
        allowed = tokens_in(guide.allowed())
        token = chance.choice(allowed)
        if allowed[0] in end and chance.random() < 0.5:
            token = allowed[0]
        guide.accept(token)
        if token in end:
            return drawn
        drawn.append(token)
    pytest.fail(f"no end after {most} tokens")


def text_of(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """As the engine decodes a completion: it goes on from a prompt."""
    stream = tokenizer.stream(continuation=True)
    return "".join(map(stream.push, tokens)) + stream.finish()


names = st.sampled_from(["a", "name", "x y", "é", 'q"'])
leaves: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"enum": ["red", 1, None]}, {"const": {"k": [1, "v"]}}]),
    st.builds(
        lambda low, width: {"type": "integer", "minimum": low, "maximum": low + width},
        st.integers(-200, 200),
        st.integers(0, 300),
    ),
    st.builds(
        lambda low, width: {"type": "string", "minLength": low, "maxLength": low + width},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.just({"type": "string", "pattern": "^[a-c]{2,4}$"}),
    st.just({"type": "string", "format": "date"}),
)


def objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], optional: set[str]) -> dict[str, Any]:
        required = [name for name in properties if name not in optional]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

    return st.builds(build, st.dictionaries(names, inner, max_size=4), st.sets(names))


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(
            lambda item, least, more: {"type": "array", "items": item, "minItems": least, "maxItems": least + more},
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        ),
        st.builds(lambda options: {"anyOf": options}, st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=6,
)


@given(schemas, st.integers())
@settings(max_examples=40)
def test_whatever_is_drawn_is_json_that_satisfies_the_schema(
    grammars: Grammars, tokenizer: Tokenizer, schema: dict[str, Any], seed: int
) -> None:
    text = text_of(tokenizer, walk(grammars.json_schema(schema)(), END, seed))
    jsonschema.validate(json.loads(text), schema)


@given(st.integers())
@settings(max_examples=10)
def test_a_sentencepiece_vocabulary_gives_the_same(tiny_grammars: Grammars, tiny: Tokenizer, seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 6}, "é": {"type": "boolean"}},
        "required": ["a", "é"],
        "additionalProperties": False,
    }
    text = text_of(tiny, walk(tiny_grammars.json_schema(schema)(), (2,), seed))
    jsonschema.validate(json.loads(text), schema)


letters = st.sampled_from(["a", "b", "z", "é", "/", '"', " ", r"\.", r"\\", "[a-c]", "[^a-y]", r"\d", "日"])
regexes = st.recursive(
    letters,
    lambda inner: st.one_of(
        st.builds(lambda left, right: left + right, inner, inner),
        st.builds(lambda left, right: f"(?:{left}|{right})", inner, inner),
        st.builds(lambda part, how: f"(?:{part}){how}", inner, st.sampled_from(["?", "{2}", "{0,3}", "{1,2}"])),
    ),
    max_leaves=8,
)


@given(regexes, st.integers())
@settings(max_examples=40)
def test_whatever_is_drawn_matches_the_regular_expression(
    grammars: Grammars, tokenizer: Tokenizer, pattern: str, seed: int
) -> None:
    text = text_of(tokenizer, walk(grammars.regex(pattern)(), END, seed))
    assert re.fullmatch(pattern, text)


# Of the 256 bytes this vocabulary lacks some: control characters, and those that begin rare planes of Unicode.
writable = st.text(st.sampled_from([*map(chr, range(0x20, 0x7F)), *"\n\tßé€日本😀"]), min_size=1, max_size=12)


@given(st.lists(writable, min_size=1, max_size=6), st.data())
@settings(max_examples=40)
def test_choices_allow_each_of_them_and_nothing_else(
    grammars: Grammars, tokenizer: Tokenizer, choices: list[str], data: st.DataObject
) -> None:
    make = grammars.choice(choices)
    assert text_of(tokenizer, walk(make(), END, data.draw(st.integers()))) in choices
    wanted = tokenizer.encode(data.draw(st.sampled_from(choices)), add_special_tokens=False)
    assume(not tokenizer.special_token_ids & set(wanted))
    assert follows(make(), wanted)


@pytest.mark.parametrize(
    "text",
    [
        '{"name":"Ann","age":3}',
        '{"name": "Ann \\"A\\" \\n é", "age": 41, "tags": ["x", {"y": null}, 1.5e3]}',
        '{\n  "name": "日本 😀",\n  "age": -1,\n  "tags": [\n    true\n  ]\n}',
        '{"name": "Ann", "age": 3, "other": [[]]}',
    ],
)
def test_every_token_of_a_text_that_satisfies_the_schema_is_allowed(
    grammars: Grammars, tokenizer: Tokenizer, text: str
) -> None:
    assert follows(grammars.json_schema(PERSON)(), tokenizer.encode(text, add_special_tokens=False))


def test_a_text_may_be_cut_into_any_tokens(grammars: Grammars, tokenizer: Tokenizer) -> None:
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in '{"name":"A","age":3}']
    assert follows(grammars.json_schema(PERSON)(), letters)


@pytest.mark.parametrize(
    "text", ['{"age":3,"name":"Ann"}', '{"name":"Ann"}', '{"name":1,"age":3}', '{"name":"A","age":3} ', "[]", "null"]
)
def test_a_text_that_does_not_satisfy_the_schema_is_not_allowed(
    grammars: Grammars, tokenizer: Tokenizer, text: str
) -> None:
    assert not follows(grammars.json_schema(PERSON)(), tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("space", ["  ", "\n\n", "\t", "\n" + " " * 33])
def test_white_space_cannot_go_on_for_ever(grammars: Grammars, tokenizer: Tokenizer, space: str) -> None:
    assert not follows(grammars.json_object()(), tokenizer.encode('{"a":' + space + "1}", add_special_tokens=False))


def test_a_schema_can_ask_for_other_white_space(grammars: Grammars, tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode('{"a": 1}', add_special_tokens=False)
    schema = {"type": "object", "x-guidance": {"whitespace_flexible": False}}
    assert not follows(grammars.json_schema(schema)(), tokens)
    assert follows(grammars.json_object()(), tokens)


@pytest.mark.parametrize("text", ["{}", '{"a": [1, {"b": "c"}]}'])
def test_any_object_is_allowed_and_nothing_but_an_object(grammars: Grammars, tokenizer: Tokenizer, text: str) -> None:
    assert follows(grammars.json_object()(), tokenizer.encode(text, add_special_tokens=False))
    assert not follows(grammars.json_object()(), tokenizer.encode(f"[{text}]", add_special_tokens=False))


def test_a_boolean_is_a_schema_too(grammars: Grammars, tokenizer: Tokenizer) -> None:
    assert follows(grammars.json_schema(True)(), tokenizer.encode("[1]", add_special_tokens=False))
    with pytest.raises(RequestError, match="schema is false"):
        grammars.json_schema(False)


def test_digits_of_a_regular_expression_are_ascii(grammars: Grammars, tokenizer: Tokenizer) -> None:
    digits = [tokenizer.token_bytes(token) for token in tokens_in(grammars.regex(r"\d")().allowed())]
    assert sorted(digits) == [b"%d" % digit for digit in range(10)]


def test_the_empty_regular_expression_allows_the_end_alone(grammars: Grammars) -> None:
    assert tokens_in(grammars.regex("")().allowed()) == sorted(END)


def test_a_grammar_is_followed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    make = grammars.grammar('start: sum\nsum: NUMBER | sum "+" sum | "(" sum ")"\nNUMBER: /[0-9]+/')
    assert follows(make(), tokenizer.encode("(1+22)+3", add_special_tokens=False))
    assert not follows(make(), tokenizer.encode("(1+22", add_special_tokens=False))


def test_a_grammar_names_special_tokens_by_their_text(grammars: Grammars, tokenizer: Tokenizer) -> None:
    (start,) = tokenizer.encode("<|im_start|>", add_special_tokens=False)
    assert tokens_in(grammars.grammar('start: <|im_start|> "a"')().allowed()) == [start]


@pytest.mark.parametrize("header", ["", '%llguidance {"no_forcing": false}\n'])
def test_a_grammar_that_must_go_on_one_way_may_be_cut_into_any_tokens(
    grammars: Grammars, tokenizer: Tokenizer, header: str
) -> None:
    guide = grammars.grammar(header + 'start: "the" "re"')()
    allowed = {tokenizer.token_bytes(token) for token in tokens_in(guide.allowed())}
    assert allowed == {b"t", b"th", b"the", b"ther", b"there"}


@pytest.mark.parametrize("size", [1, 100, TINY_VOCAB, 1000])
def test_a_mask_has_the_bits_of_the_models_vocabulary(tiny: Tokenizer, size: int) -> None:
    made = Grammars(tiny, size + 3, [2])
    try:
        mask = made.regex("(?s:.)*")().allowed()
    finally:
        made.close()
    assert len(mask) == -(-(size + 3) // 8)
    assert set(tokens_in(mask)) <= set(range(min(size + 3, tiny.vocab_size)))


def test_tokens_of_the_same_bytes_are_allowed_alike(tiny_grammars: Grammars, tiny: Tokenizer) -> None:
    allowed = tokens_in(tiny_grammars.regex("a|é")().allowed())
    assert sorted(tiny.token_bytes(token) for token in allowed) == sorted([b"a", b"a", "é".encode(), b"\xc3"])


def test_a_space_that_a_text_may_begin_with_is_part_of_it(tiny_grammars: Grammars, tiny: Tokenizer) -> None:
    allowed = [tiny.token_bytes(token) for token in tokens_in(tiny_grammars.regex("a")().allowed())]
    assert allowed == [b"a", b"a"]


def test_special_tokens_are_no_text_but_a_users_own_are(tiny_grammars: Grammars, tiny: Tokenizer) -> None:
    allowed = {tiny.token_bytes(token) for token in tokens_in(tiny_grammars.regex("<s>|</s>|<tool>")().allowed())}
    assert allowed == {b"<", b"<tool>"}


def test_all_end_tokens_are_allowed_where_the_text_is_complete_and_nowhere_else(
    grammars: Grammars, tokenizer: Tokenizer
) -> None:
    guide = grammars.regex("(ab){1,2}")()
    for token, complete in zip(tokenizer.encode("ab", add_special_tokens=False), (True,), strict=True):
        assert not set(END) & set(tokens_in(guide.allowed()))
        guide.accept(token)
        assert (set(END) <= set(tokens_in(guide.allowed()))) == complete


def test_after_the_end_only_end_tokens_are_allowed_and_accepted(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = grammars.regex("[0-9]+")()
    for token in [*tokenizer.encode("42", add_special_tokens=False), 0, 2, 2]:
        guide.accept(token)
    assert tokens_in(guide.allowed()) == sorted(END)


def test_an_end_token_with_text_of_its_own_is_not_text(tiny: Tokenizer) -> None:
    byte, piece = (token for token in range(tiny.vocab_size) if tiny.token_bytes(token) == b"a")
    made = Grammars(tiny, TINY_VOCAB, [piece, 2])
    try:
        guide = made.regex("a{2}")()
        assert [tiny.token_bytes(token) for token in tokens_in(guide.allowed())] == [b"a", b"aa"]
        guide.accept(byte)
        assert tokens_in(guide.allowed()) == [byte]
        guide.accept(byte)
        assert tokens_in(guide.allowed()) == [2, piece]
    finally:
        made.close()


def test_a_token_that_was_not_allowed_is_an_error(grammars: Grammars, tokenizer: Tokenizer) -> None:
    guide = grammars.regex("[0-9]+")()
    (letter,) = tokenizer.encode("x", add_special_tokens=False)
    with pytest.raises(RequestError, match=f'with token {letter} drawn, cannot be followed: token "x" doesn\'t'):
        guide.accept(letter)


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_an_end_token_past_the_vocabulary_is_refused(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(RequestError, match=f"token {token} cannot be allowed"):
        Grammars(tokenizer, VOCAB, [2, token])


def test_a_model_without_end_tokens_is_refused_on_use(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="needs a token that ends a text"):
        Grammars(tokenizer, VOCAB, []).json_object()


def test_guides_of_one_function_do_not_disturb_each_other(grammars: Grammars, tokenizer: Tokenizer) -> None:
    make = grammars.choice(["one", "two"])
    first, second = make(), make()
    before = second.allowed()
    for token in tokenizer.encode("one", add_special_tokens=False):
        first.accept(token)
    assert second.allowed() == make().allowed() == before
    assert tokens_in(first.allowed()) == sorted(END)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What has been compiled."""
    done: list[str] = []

    def counted(tokenizer: Any, grammar: str) -> Any:
        done.append(grammar)
        return compile_grammar(tokenizer, grammar)

    monkeypatch.setattr("phalanx.engine.grammar.compile_grammar", counted)
    return done


def test_nothing_is_compiled_twice_though_many_threads_ask_at_once(
    grammars: Grammars, tokenizer: Tokenizer, compiled: list[str]
) -> None:
    texts: list[str] = []

    def ask(seed: int) -> None:
        for number in range(4):
            make = grammars.regex(f"thread[0-9]{number}")
            texts.append(text_of(tokenizer, walk(make(), END, seed)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 4
    assert len(texts) == 32
    assert all(re.fullmatch("thread[0-9][0-3]", text) for text in texts)


@pytest.mark.parametrize("limits", [{"max_kept": 2}, {"max_kept_bytes": 2 * len("start: /1/")}])
def test_what_was_used_longest_ago_is_forgotten_first(
    tiny: Tokenizer, compiled: list[str], limits: dict[str, int]
) -> None:
    made = Grammars(tiny, TINY_VOCAB, [2], **limits)
    try:
        for pattern in ("1", "2", "1", "3", "1", "2"):
            made.regex(pattern)
    finally:
        made.close()
    assert compiled == ["start: /1/", "start: /2/", "start: /3/", "start: /2/"]


def test_a_tree_is_a_schema_whose_texts_end(grammars: Grammars, tokenizer: Tokenizer) -> None:
    tree = {
        "type": "object",
        "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["kids"],
        "additionalProperties": False,
    }
    text = '{"kids": [{"kids": []}, {"kids": [{"kids": []}]}]}'
    assert follows(grammars.json_schema(tree)(), tokenizer.encode(text, add_special_tokens=False))


def test_a_guide_is_made_without_compiling(grammars: Grammars, compiled: list[str]) -> None:
    make: Callable[[], Guide] = grammars.json_object()
    known = len(compiled)
    assert all(isinstance(make(), GrammarGuide) for _ in range(100))
    assert len(compiled) == known
