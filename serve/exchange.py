"""One request over HTTP, from its first byte to the last of its answer: what is noted of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from phalanx.serve.errors import ApiError
from phalanx.serve.tracing import Span, Value


@dataclass(slots=True)
class Exchange:
    """What is known of a request so far. Never its texts: this is what logs, traces and metrics are made of.

    request_id: the client's own where it sent one. began_s: on the clock of `time.perf_counter`. refusal: why the
    server did not do what was asked. disconnected: whether the client went before it was answered.
    """

    request_id: str
    method: str
    path: str
    client: str
    began_s: float = field(default_factory=time.perf_counter)
    key: str | None = None
    status: int | None = None
    refusal: str | None = None
    disconnected: bool = False
    streamed: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    queued_s: float | None = None
    first_token_s: float | None = None
    finish_reasons: list[str] = field(default_factory=list)
    span: Span = field(default_factory=Span)
    trace: dict[str, Value] = field(default_factory=dict)  # what the span says at its end

    def refused(self, error: ApiError) -> ApiError:
        """Takes note of what the client is told instead of what it asked for."""
        self.refusal = error.reason
        return error

    @classmethod
    def of(cls, request: Request) -> Exchange:
        """That of a request in a handler."""
        exchange: Exchange = request.state.exchange
        return exchange
