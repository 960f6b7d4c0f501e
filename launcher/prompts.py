"""Reading the prompts of a JSON-lines file."""

from __future__ import annotations

from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import msgspec

from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import ConfigError, Problem, RequestError

_PARAMS = {field.name for field in fields(SamplingParams)} - {"guide"}  # which is code


class PromptLine(NamedTuple):
    """A prompt, text or token ids, and how to complete it."""

    prompt: str | list[int]
    params: SamplingParams


def read_prompts(path: Path, defaults: SamplingParams) -> list[PromptLine]:
    """The prompts of a file of JSON lines: `{"prompt": "text"}` or `{"prompt_token_ids": [..]}`, each with any of the
    sampling parameters, which replace those of `defaults`. Raises ConfigError with everything that is wrong, by line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("", f"cannot be read: {error}")], str(path)) from None
    lines, problems = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                lines.append(_prompt_line(line, defaults))
            except (RequestError, msgspec.DecodeError) as error:
                problems.append(Problem("", str(error), found=line[:80], line=number))
    if problems:
        raise ConfigError(problems, str(path))
    return lines


def _prompt_line(line: str, defaults: SamplingParams) -> PromptLine:
    data = msgspec.json.decode(line)
    if not isinstance(data, dict):
        raise RequestError('a line is an object such as {"prompt": "text"}')
    if ("prompt" in data) == ("prompt_token_ids" in data):
        raise RequestError("a line has either `prompt` or `prompt_token_ids`")
    prompt = data.pop("prompt", None)
    token_ids = data.pop("prompt_token_ids", None)
    unknown = [key for key in data if key not in _PARAMS]
    if unknown:
        near = get_close_matches(unknown[0], _PARAMS, 1)
        raise RequestError(f"unknown key {unknown[0]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if isinstance(bias := data.get("logit_bias"), dict):  # keys of JSON are text
        data["logit_bias"] = {int(token) if token.isdecimal() else token: each for token, each in bias.items()}
    params = replace(defaults, **data)
    if token_ids is not None:
        return PromptLine(msgspec.convert(token_ids, list[int]), params)
    return PromptLine(msgspec.convert(prompt, str), params)
