"""From a request's fields to the engine's sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

from phalanx.engine.grammar import Grammars
from phalanx.engine.guide import Guide
from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import RequestError
from phalanx.serve.errors import ApiError
from phalanx.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest

MakeGuide = Callable[[], Guide]
T = TypeVar("T")


def sampling_params(
    wanted: CompletionRequest | ChatRequest,
    max_tokens: int,
    guide: MakeGuide | None,
    *,
    show_special_tokens: bool = False,
) -> SamplingParams:
    """show_special_tokens: whatever the request says. Raises ApiError or RequestError for what is out of range."""
    if isinstance(wanted, CompletionRequest):
        logprobs, prompt_logprobs = wanted.logprobs, wanted.prompt_logprobs
        if wanted.echo and logprobs is not None:
            prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    else:
        logprobs, prompt_logprobs = (wanted.top_logprobs or 0) if wanted.logprobs else None, None
    if guide is not None and wanted.allowed_token_ids is not None:
        raise ApiError(
            400,
            "allowed_token_ids and a form of the text are asked for together; give one of them",
            param="allowed_token_ids",
        )
    return SamplingParams(
        max_tokens=max(1, max_tokens),
        temperature=_or(wanted.temperature, 1.0),
        top_k=max(0, wanted.top_k or 0),
        top_p=_or(wanted.top_p, 1.0),
        min_p=_or(wanted.min_p, 0.0),
        seed=wanted.seed,
        stop=tuple([wanted.stop] if isinstance(wanted.stop, str) else wanted.stop or ()),
        stop_token_ids=tuple(wanted.stop_token_ids or ()),
        ignore_eos=bool(wanted.ignore_eos),
        skip_special_tokens=not show_special_tokens and wanted.skip_special_tokens is not False,
        logprobs=logprobs,
        n=_or(wanted.n, 1),
        presence_penalty=_or(wanted.presence_penalty, 0.0),
        frequency_penalty=_or(wanted.frequency_penalty, 0.0),
        repetition_penalty=_or(wanted.repetition_penalty, 1.0),
        logit_bias=_biases(wanted.logit_bias or {}),
        allowed_token_ids=None if wanted.allowed_token_ids is None else tuple(wanted.allowed_token_ids),
        min_tokens=wanted.min_tokens or 0,
        prompt_logprobs=prompt_logprobs,
        guide=guide,
    )


def is_guided(wanted: GenerationRequest) -> bool:
    """Whether a request asks for a form of its text. Raises ApiError where it asks for several."""
    asked = [name for name in FORMS if getattr(wanted, name) is not None]
    if wanted.response_format is not None and wanted.response_format.type == "text":
        asked.remove("response_format")
    if len(asked) > 1:
        raise ApiError(400, f"{' and '.join(asked)} are asked for together; give one of them", param=asked[0])
    return bool(asked)


FORMS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "response_format")


def make_guide(wanted: GenerationRequest, grammars: Grammars) -> MakeGuide:
    """What holds the text to the form that a request asks for. Compiles it: not for the event loop.

    Raises ApiError for a form that cannot be had.
    """
    try:
        return _compiled(wanted, grammars)
    except RequestError as error:
        asked = next(name for name in FORMS if getattr(wanted, name) is not None)
        raise ApiError(400, str(error), param=asked) from None


def _compiled(wanted: GenerationRequest, grammars: Grammars) -> MakeGuide:
    if wanted.guided_json is not None:
        return grammars.json_schema(_schema(wanted.guided_json))
    if wanted.guided_regex is not None:
        return grammars.regex(wanted.guided_regex)
    if wanted.guided_choice is not None:
        return grammars.choice(wanted.guided_choice)
    if wanted.guided_grammar is not None:
        return grammars.grammar(wanted.guided_grammar)
    form = wanted.response_format
    if form is None or form.type != "json_schema":
        return grammars.json_object()
    if form.json_schema is None or form.json_schema.json_schema is None:
        raise ApiError(400, "response_format.json_schema.schema: this field is needed", param="response_format")
    return grammars.json_schema(form.json_schema.json_schema)


def _schema(value: Any) -> Any:
    """A schema, given as JSON or as its text."""
    if not isinstance(value, str):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"guided_json is text, but not JSON: {error}", param="guided_json") from None
    if not isinstance(schema, dict | bool):
        raise ApiError(400, "guided_json is no JSON schema; allowed: an object, true or false", param="guided_json")
    return schema


def _biases(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError as error:
        raise ApiError(
            400, f"logit_bias: {str(error)[:100]}; allowed: token ids, as text", param="logit_bias"
        ) from None


def _or(value: T | None, default: T) -> T:
    return default if value is None else value
