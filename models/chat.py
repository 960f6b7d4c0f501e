"""Chat messages to the text that a model was trained on, by the Jinja template that comes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from phalanx.errors import ModelError, RequestError

if TYPE_CHECKING:
    import jinja2


def render_chat(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    **extra: Any,
) -> str:
    """The text of a conversation, ready for `Tokenizer.encode(..., add_special_tokens=False)`.

    template: the model's own, in the dialect of transformers' `apply_chat_template`; it runs in Jinja's sandbox.
    messages: each with `role` and `content`, and what else the template knows. add_generation_prompt: whether to end
    where the assistant's answer begins. extra: further variables, such as `enable_thinking`.

    Raises RequestError where there is no template, or it refuses the messages; ModelError where the template is broken.
    """
    import jinja2

    if template is None:
        raise RequestError(
            "the model has no chat template; send a plain prompt, or use an instruct model, whose"
            " tokenizer_config.json, chat_template.jinja or GGUF file carries one"
        )
    if not messages:
        raise RequestError("a conversation needs at least one message")
    compiled = compile_template(template)
    try:
        return compiled.render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
            tools=tools,
            **extra,
        )
    except RequestError:
        raise
    except jinja2.exceptions.SecurityError as error:
        raise ModelError(f"the chat template does what the sandbox forbids: {error}") from error
    except (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise RequestError(
            f"the chat template cannot render these messages: {type(error).__name__}: {error}"
        ) from error


@lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
    import jinja2
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationBlock(Extension):
        """`{% generation %}` marks the assistant's text for training; here it is the text alone."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise ModelError(
            f"the model's chat template is not valid Jinja: line {error.lineno}: {error.message}"
        ) from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter escapes what HTML would mind."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise RequestError(f"the model's chat template refuses these messages: {message}")


def _strftime_now(pattern: str) -> str:
    """Today, in the words of `strftime`: Llama 3.1's template states the date."""
    return datetime.now().strftime(pattern)
