"""Chat templates against transformers' `apply_chat_template`, and templates that go wrong."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from phalanx.errors import ModelError, RequestError
from phalanx.models.chat import render_chat
from phalanx.models.resolve import ModelSource

CHAT = [
    {"role": "system", "content": "Be brief. <b> & 'ü'"},
    {"role": "user", "content": "Hi\nthere"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2 + 2?"},
]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "a & b <ü>", "parameters": {"x": 1}}}]

LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages
%}{% endif -%} {% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Roles must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}
    {% else %}
{{ ' ' + message['content'] + eos_token }}
    {% endif %}
{% endfor %}
"""
TOOL_USE = """{% if tools %}{{ tools | tojson(indent=2) }}
{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}
{% generation %}{{ message.content | tojson }}{% endgeneration %}
{% endfor %}{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"""


def reference(template: str, messages: list[dict[str, Any]], prompt: bool, **extra: Any) -> str:
    (text,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=prompt, **extra)
    return str(text)


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("messages", [CHAT, CHAT[1:], CHAT[1:2]])
def test_the_builtin_models_template_renders_as_in_transformers(
    smollm2: ModelSource, messages: list[dict[str, Any]], prompt: bool
) -> None:
    tokenizer = smollm2.tokenizer()
    assert tokenizer.chat_template is not None
    special: dict[str, Any] = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    ours = render_chat(tokenizer.chat_template, messages, add_generation_prompt=prompt, **special)
    assert ours == reference(tokenizer.chat_template, messages, prompt, **special)
    assert "Hi\nthere" in ours


def test_blocks_and_special_tokens_render_as_in_transformers() -> None:
    ours = render_chat(LLAMA2, CHAT, bos_token="<s>", eos_token="</s>")
    assert ours == reference(LLAMA2, CHAT, True, bos_token="<s>", eos_token="</s>")
    assert ours.startswith("<s>[INST] Hi")


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_tools_loop_controls_and_generation_marks_render_as_in_transformers(tools: list[dict[str, Any]] | None) -> None:
    ours = render_chat(TOOL_USE, CHAT, tools=tools, enable_thinking=False)
    assert ours == reference(TOOL_USE, CHAT, True, tools=tools, enable_thinking=False)
    assert "<think></think>" in ours


def test_the_date_can_be_asked_for() -> None:
    text = render_chat("{{ strftime_now('%Y') }}", CHAT)
    assert len(text) == 4
    assert text.isdigit()


def test_what_the_template_refuses_is_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="refuses these messages: Roles must alternate"):
        render_chat(LLAMA2, [CHAT[2]])


@pytest.mark.parametrize(
    "messages", [[{"role": "user", "content": ["no", "text"]}], [{"role": "user", "content": None}]]
)
def test_messages_that_cannot_be_rendered_are_the_requests_fault(messages: list[dict[str, Any]]) -> None:
    with pytest.raises(RequestError, match="cannot render these messages"):
        render_chat(LLAMA2, messages)


def test_a_model_without_a_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="no chat template; send a plain prompt"):
        render_chat(None, CHAT)


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(RequestError, match="at least one message"):
        render_chat(LLAMA2, [])


def test_a_template_that_is_no_jinja_is_named_with_its_line() -> None:
    with pytest.raises(ModelError, match="not valid Jinja: line 2"):
        render_chat("a\n{% if %}", CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% do messages.append(1) %}",
        "{{ messages.clear() }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox_or_change_the_messages(template: str) -> None:
    messages = [dict(message) for message in CHAT]
    with pytest.raises((ModelError, RequestError)):
        render_chat(template, messages)
    assert messages == CHAT


@pytest.mark.parametrize("secret", ["raise_exception.__globals__", "strftime_now.__code__", "messages.__class__"])
def test_a_template_sees_nothing_of_python(secret: str) -> None:
    assert render_chat(f"[{{{{ {secret} }}}}]", CHAT) == "[]"
