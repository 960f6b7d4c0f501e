"""Errors in OpenAI's shape: what went wrong, and what is allowed."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from typing import Any

import msgspec
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.responses import JSONResponse, Response

from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import ContextLengthError, ModelError, PhalanxError, QueueFullError, RequestError
from phalanx.serve.answers import Error

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_PROBLEMS = 8  # of one body that are told
MAX_FOUND = 1000  # that are looked through for those
MAX_PLACE = 200  # characters of a field's path


class ApiError(Exception):
    """A request that is refused. retry_after_s: when it may be sent again, in seconds. param: the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        """In a word, for logs."""
        return self.code or ("invalid" if self.status < 500 else "server_error")

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def body(self) -> Error:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        return JsonResponse(self.body(), self.status, self.headers)


class JsonResponse(JSONResponse):
    """JSON by msgspec."""

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def as_api_error(error: Exception, retry_after_s: float) -> ApiError:
    """What a client is told of an error. retry_after_s: where the server is too busy."""
    match error:
        case ApiError():
            return error
        case ContextLengthError():
            return ApiError(400, str(error), param="prompt", code="context_length_exceeded")
        case RequestError() | ModelError():  # the latter of a template, which is tried on messages
            return ApiError(400, str(error), param=_param(str(error)))
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", retry_after_s=retry_after_s)
        case PhalanxError():
            return ApiError(503, first_line(error), code="engine_failed")
    logger.error("a request failed by a bug", exc_info=error)
    return ApiError(500, f"the server failed on this request: {type(error).__name__}; its log has more")


def first_line(error: Exception) -> str:
    """What is told of a failure to those who need not see its traceback."""
    return str(error).partition("\n")[0] or type(error).__name__


class ClientGoneError(Exception):
    """The client went away, or was cut off: there is nobody to answer."""


def body_error(error: ValidationError, fields: Collection[str]) -> ApiError:
    """What is wrong with a body, field by field. fields: those that it may have."""
    if error.error_count() > MAX_FOUND:  # naming them would take seconds
        words = f"{error.error_count()} things are wrong with the body; /openapi.json says what is allowed"
        return ApiError(400, words, code="too_many_problems")
    problems = error.errors(include_url=False)
    if problems[0]["type"] == "json_invalid":
        found = problems[0]["msg"].removeprefix("Invalid JSON: ")
        words = f"the body is not JSON: {found}; allowed: an object as JSON text in UTF-8, not compressed"
        return ApiError(400, words, code="json_invalid")
    places = _by_place(problems)
    told = [_words(place, each, fields) for place, each in islice(places.items(), MAX_PROBLEMS)]
    if len(places) > len(told):
        told.append(f"and {len(places) - len(told)} more problems")
    return ApiError(400, "; ".join(told), param=next(iter(places)) or None)


def _by_place(problems: Sequence[ErrorDetails]) -> dict[str, list[ErrorDetails]]:
    """A value that may have several forms has a problem with each. Where one form fits but for what is in it, the
    others say nothing.
    """
    places: dict[str, list[ErrorDetails]] = {}
    around: set[str] = set()
    for problem in problems:
        parts = _place(problem)
        around.update(".".join(parts[:end]) for end in range(1, len(parts)))
        places.setdefault(".".join(parts)[:MAX_PLACE], []).append(problem)
    return {place: each for place, each in places.items() if place not in around}


def _place(problem: ErrorDetails) -> list[str]:
    """The path to a field, without what pydantic calls the forms that it may have: `str`, `list[TextPart]`, a tag."""
    *path, last = problem["loc"] or ("",)
    own = problem["type"] == "extra_forbidden"  # a name of the client's choice
    parts = [str(part) for part in path if not _FORM.fullmatch(str(part))]
    return [*parts, str(last)] if own or not _FORM.fullmatch(str(last)) else parts


_FORM = re.compile(r"str|bool|int|float|[A-Z]\w+|.*[\[ ].*", re.DOTALL)


def _words(place: str, problems: Sequence[ErrorDetails], fields: Collection[str]) -> str:
    first = problems[0]
    if first["type"] == "extra_forbidden":
        near = get_close_matches(place, fields, 1)
        return f"{place}: unknown field; " + (f"meant {near[0]}?" if near else "/openapi.json says which there are")
    if first["type"] == "missing":
        return f"{place}: this field is needed"
    # The form that a value has, but for its size, is the one that was meant.
    meant = [problem for problem in problems if not _is_of_another_form(problem)] or problems
    words = " or ".join(dict.fromkeys(_plain(problem["msg"]) for problem in meant))
    return f"{place or 'the body'}: found {_short(first['input'])}; allowed: {words}"


def _is_of_another_form(problem: ErrorDetails) -> bool:
    return problem["type"].endswith("_type") or problem["type"] == "literal_error"


def _plain(message: str) -> str:
    """Of pydantic's messages, what says something to one who does not know it."""
    message = re.sub(r"^\w+ should (be |have )?", "", message).replace(" after validation", "")
    return re.sub(r"\ba valid ([aeiou])?", lambda match: f"an {match[1]}" if match[1] else "a ", message)


def _short(value: object) -> str:
    """A value as JSON has it, or what kind of one it is."""
    if isinstance(value, str):
        return ascii(value[:40]) + ("..." if len(value) > 40 else "")
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    return json.dumps(value)[:40]


def _param(message: str) -> str | None:
    """The sampling parameter that a message begins with."""
    name = message.partition(" ")[0]
    return name if name in _PARAMS else None


_PARAMS: Mapping[str, Any] = SamplingParams.__dataclass_fields__
