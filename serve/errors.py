"""Errors in OpenAI's shape: what went wrong, and what is allowed."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from pydantic_core import ErrorDetails
from starlette.responses import Response

from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import ModelError, PhalanxError, QueueFullError, RequestError
from phalanx.serve.answers import Error

logger = logging.getLogger(__name__)

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
MAX_PROBLEMS = 8  # of one body that are told


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


class JsonResponse(Response):
    """JSON by msgspec."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return msgspec.json.encode(content)


def as_api_error(error: Exception, retry_after_s: float) -> ApiError:
    """What a client is told of an error. retry_after_s: where the server is too busy."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), param=_param(str(error)))
        case QueueFullError():
            return ApiError(429, str(error), code="queue_full", retry_after_s=retry_after_s)
        case ModelError():
            return ApiError(400, str(error))  # of a template, which is tried on messages
        case PhalanxError():
            return ApiError(503, str(error), code="engine_failed")
    logger.error("a request failed by a bug", exc_info=error)
    return ApiError(500, f"the server failed on this request: {type(error).__name__}; its log has more")


def body_error(problems: Sequence[ErrorDetails]) -> ApiError:
    """What is wrong with a body, field by field."""
    if any(problem["type"] == "json_invalid" for problem in problems):
        return ApiError(400, f"the body is not JSON: {problems[0]['msg']}", code="json_invalid")
    words = [_words(problem) for problem in problems[:MAX_PROBLEMS]]
    if len(problems) > len(words):
        words.append(f"and {len(problems) - len(words)} more problems")
    return ApiError(400, "; ".join(words), param=_place(problems[0]) or None)


def _words(problem: ErrorDetails) -> str:
    place, kind = _place(problem), problem["type"]
    if kind == "extra_forbidden":
        return f"{place}: unknown field; see /openapi.json for those there are"
    if kind == "missing":
        return f"{place}: this field is needed"
    found = _short(problem["input"])
    return f"{place or 'the body'}: {problem['msg']}" + (f", found {found}" if found else "")


def _place(problem: ErrorDetails) -> str:
    """The field's path, without what pydantic calls the forms that it may have: `str`, `list[TextPart]`, a tag."""
    *path, last = problem["loc"] or ("",)
    if problem["type"] != "extra_forbidden":
        path.append(last)
        last = ""
    parts = [str(part) for part in path if isinstance(part, int) or (part.islower() and part not in _FORMS)]
    return ".".join([*(part for part in parts if not _ODD.search(part)), *([str(last)] if last else [])])[:200]


_FORMS = ("str", "bool", "int", "float")
_ODD = re.compile(r"[\[\] ]")


def _short(value: object) -> str:
    if isinstance(value, bool | int | float) or value is None:
        return repr(value)[:40]
    if isinstance(value, str):
        return ascii(value[:40]) + ("..." if len(value) > 40 else "")
    return ""


def _param(message: str) -> str | None:
    """The sampling parameter that a message begins with."""
    name = message.partition(" ")[0]
    return name if name in _PARAMS else None


_PARAMS: Mapping[str, Any] = SamplingParams.__dataclass_fields__
