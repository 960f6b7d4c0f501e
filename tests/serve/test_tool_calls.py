"""The forms of tool calls: what is read out of each, nothing lost, and which form a model's template shows."""

from __future__ import annotations

import json
import re
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.serve.tool_texts import ALL_FORMATS, EXAMPLES, FRAGMENTS, HERMES, LLAMA, MISTRAL, PYTHONIC, in_pieces

from phalanx.errors import ModelError, RequestError
from phalanx.serve.tool_calls import FORMATS, JSON, Parsed, ToolFormat, knows_tools, parser_for

# ---- what is read out of each form ----


@pytest.mark.parametrize("example", EXAMPLES)
def test_a_whole_answer_is_split_into_content_and_calls(example: str) -> None:
    format_, text, content, calls = EXAMPLES[example]
    parsed = format_.parse(text)
    assert (parsed.content, [(call.name, call.arguments) for call in parsed.tool_calls]) == (content, calls)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(ALL_FORMATS), st.lists(FRAGMENTS, max_size=5).map("".join))
def test_a_text_without_calls_comes_back_as_it_was(format_: ToolFormat, text: str) -> None:
    parsed = format_.parse(text)
    if not parsed.tool_calls:
        assert parsed.content == text
    elif format_ is not PYTHONIC:  # the arguments of each are there, in order and unchanged, but for those it lacks
        place = 0
        for part in (part for call in parsed.tool_calls for part in call.arguments.split("{}")):
            assert part in text[place:]
            place = text.index(part, place) + len(part)


NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,20}", fullmatch=True).filter(lambda name: name not in ("None", "True"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RANDOM_CALLS = st.lists(st.tuples(NAMES, st.dictionaries(st.text(), VALUES, max_size=3)), min_size=1, max_size=3)

# As the models' templates write a conversation's calls, in our words.
RENDERED: dict[str, tuple[ToolFormat, str]] = {
    "qwen": (
        HERMES,
        "{% for name, arguments in calls %}{{ '\\n' if not loop.first }}<tool_call>\n"
        '{"name": {{ name | to_json }}, "arguments": {{ arguments | to_json }}}\n</tool_call>{% endfor %}',
    ),
    "smollm2": (
        HERMES,
        "<tool_call>[{% for name, arguments in calls %}{{ ', ' if not loop.first }}"
        '{"name": {{ name | to_json }}, "arguments": {{ arguments | to_json }}}{% endfor %}]</tool_call>',
    ),
    "llama": (
        LLAMA,
        "{% for name, arguments in calls %}{{ '; ' if not loop.first }}"
        '{"name": {{ name | to_json }}, "parameters": {{ arguments | to_json }}}{% endfor %}',
    ),
    "mistral v3": (
        MISTRAL,
        "[TOOL_CALLS] [{% for name, arguments in calls %}{{ ', ' if not loop.first }}"
        '{"arguments": {{ arguments | to_json }}, "name": {{ name | to_json }}, "id": "123456789"}{% endfor %}]',
    ),
    "mistral v11": (
        MISTRAL,
        "{% for name, arguments in calls %}[TOOL_CALLS]{{ name }}[CALL_ID]123456789[ARGS]{{ arguments | to_json }}"
        "{% endfor %}",
    ),
    "mistral v13": (
        MISTRAL,
        "{% for name, arguments in calls %}[TOOL_CALLS]{{ name }}[ARGS]{{ arguments | to_json }}{% endfor %}",
    ),
    "forced": (
        JSON,
        "[{% for name, arguments in calls %}{{ ',' if not loop.first }}"
        '{"name":{{ name | to_json }},"parameters":{{ arguments | to_json }}}{% endfor %}]',
    ),
}


@pytest.mark.parametrize("form", RENDERED)
@settings(max_examples=40, deadline=None)
@given(calls=RANDOM_CALLS)
def test_calls_that_a_template_writes_are_read_back(form: str, calls: list[tuple[str, Any]]) -> None:
    format_, template = RENDERED[form]
    environment = jinja2.Environment(keep_trailing_newline=True)
    environment.filters["to_json"] = lambda value: json.dumps(value, ensure_ascii=False)
    parsed = format_.parse(environment.from_string(template).render(calls=calls))
    assert parsed.content == ""
    assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == calls


KEYWORDS = st.from_regex(r"[a-z]{1,6}_", fullmatch=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(KEYWORDS, st.dictionaries(KEYWORDS, VALUES, max_size=3)), min_size=1, max_size=3))
def test_calls_in_pythons_own_words_are_read_back(calls: list[tuple[str, dict[str, Any]]]) -> None:
    written = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})" for name, given in calls]
    parsed = PYTHONIC.parse(f"[{', '.join(written)}]")
    assert parsed.content == ""
    assert [(call.name, json.loads(call.arguments)) for call in parsed.tool_calls] == calls


HOSTILE = ["-" * 10**5 + "1", "[" * 10**4 + "]" * 10**4, "a" + ".a" * 10**4, "1" + "+1" * 10**4, "9" * 5000]
NO_DATA = ["f'{1}'", "b''", "x", "*x", "lambda: 1", "[i for i in x]", "{**x}", "{1: 2}", "1j", "..."]


@pytest.mark.parametrize("value", [*HOSTILE, *NO_DATA], ids=lambda value: value[:8])
def test_python_that_is_no_plain_data_is_content(value: str) -> None:
    assert PYTHONIC.parse(f"[f(a={value})]") == Parsed(f"[f(a={value})]", ())


@pytest.mark.filterwarnings("error")
def test_an_escape_that_python_does_not_know_is_taken_as_it_is() -> None:
    assert PYTHONIC.parse(r"[f(a='\d')]").tool_calls[0].arguments == r'{"a": "\\d"}'


@pytest.mark.parametrize(
    "call", ["f(1)", "f(*x)", 'f(**{"a": 1})', "f(a=1)(b=2)", "1(a=1)", "f..g()", "f(", "f()\0", "f() x"]
)
def test_what_is_no_call_with_keywords_is_content(call: str) -> None:
    assert PYTHONIC.parse(f"[{call}]") == Parsed(f"[{call}]", ())


# ---- ids ----


def test_ids_are_openais_and_never_twice_the_same() -> None:
    ids = [call.id for _ in range(50) for call in HERMES.parse(EXAMPLES["hermes: SmolLM2's list"][1]).tool_calls]
    assert len(set(ids)) == 100
    assert all(re.fullmatch(r"call_[0-9a-f]{24}", each) for each in ids)


def test_mistrals_ids_are_nine_letters_and_digits_or_the_models_own() -> None:
    first, second = MISTRAL.parse(EXAMPLES["mistral: with ids"][1]).tool_calls
    assert first.id == "abcDEF123"
    assert re.fullmatch(r"[0-9A-Za-z]{9}", second.id)
    assert second.id != MISTRAL.parse(EXAMPLES["mistral: with ids"][1]).tool_calls[1].id


def test_forced_calls_have_the_ids_that_the_models_template_wants() -> None:
    text = '[{"name": "f", "parameters": {}}]'
    assert len(MISTRAL.forced().parse(text).tool_calls[0].id) == 9
    assert len(HERMES.forced().parse(text).tool_calls[0].id) == 29


# ---- special tokens ----


@pytest.mark.parametrize(
    ("format_", "special", "needed"),
    [
        (MISTRAL, {"</s>", "[TOOL_CALLS]"}, True),
        (LLAMA, {"<|eot_id|>", "<|python_tag|>"}, True),
        (HERMES, {"<|im_end|>"}, False),
        (HERMES, {"<|im_end|>", "</tool_call>"}, True),
        (JSON, {"[TOOL_CALLS]"}, False),
    ],
)
def test_special_tokens_are_shown_where_the_marks_are_among_them(
    format_: ToolFormat, special: set[str], needed: bool
) -> None:
    assert format_.needs_special_tokens(special) is needed


def test_special_tokens_that_are_no_marks_are_left_out_of_content_and_arguments() -> None:
    special = ["[THINK]", "</s>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
    parsed = MISTRAL.parse('Hm[THINK][TH.[TOOL_CALLS]f[CALL_ID]x[ARGS]{"a": "b</s>"}', special)
    assert parsed.content == "Hm[TH."
    assert [(call.name, call.arguments) for call in parsed.tool_calls] == [("f", '{"a": "b"}')]


def test_the_longest_of_several_special_tokens_is_left_out() -> None:
    assert in_pieces(HERMES, "a<x>b<x>>c<x", special=["<x>", "<x>>"]) == Parsed("abc<x", ())


# ---- choosing the form ----

TEMPLATES = {
    "hermes": "{% if tools %}Call within <tool_call></tool_call> marks.{% endif %}{{ messages }}",
    "mistral": "{% if tools is defined %}[AVAILABLE_TOOLS]{{ tools }}{% endif %}{{ '[TOOL_CALLS]' }}",
    "llama": "{% for tool in tools %}{% break %}{% endfor %}"
    'Write {"name": function name, "parameters": dictionary of argument name and its value}.',
    "pythonic": "{{ tools }} Answer with [func_name1(params_name1=params_value1...)], not <|python_tag|>",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_chat_template_shows_the_form(name: str) -> None:
    assert parser_for(TEMPLATES[name]) is FORMATS[name]


def test_the_tag_of_built_in_tools_shows_llamas_form() -> None:
    assert parser_for("{{ '<|python_tag|>' + tool_call.name }}") is LLAMA


@pytest.mark.parametrize(
    "template", [None, "{{ messages }}", "{{ tools }}<tool_call>\n<function=f>", "{{ tools }}<tool_call>f\n<arg_key>"]
)
def test_templates_that_show_no_known_form_give_none(template: str | None) -> None:
    assert parser_for(template) is None


def test_a_name_overrules_the_template() -> None:
    assert parser_for(TEMPLATES["mistral"], "hermes") is HERMES
    assert parser_for(None, "llama") is LLAMA
    assert parser_for(TEMPLATES["mistral"], "none") is None


def test_a_wrong_name_is_refused_with_the_allowed_ones() -> None:
    with pytest.raises(RequestError, match="`qwen`; allowed: auto, hermes, llama, mistral, pythonic, none"):
        parser_for(None, "qwen")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        *((template, True) for template in TEMPLATES.values()),
        ("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}", True),
        ("{% generation %}{{ tools }}{% endgeneration %}", True),
        ("{% if own is defined %}{% set tools = own %}{% endif %}{% if tools %}x{% endif %}", True),
        ("{{ messages }}", False),
        ("{{ messages.tools }} tools {# tools #}", False),
        ("{% set tools = [] %}{{ tools }}", False),
        (None, False),
    ],
)
def test_a_template_knows_tools_where_it_has_a_place_for_them(template: str | None, expected: bool) -> None:
    assert knows_tools(template) is expected


def test_a_template_that_is_no_jinja_is_an_error() -> None:
    with pytest.raises(ModelError, match="not valid Jinja"):
        knows_tools("{% if %}")
