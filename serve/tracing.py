"""Traces of requests by OpenTelemetry: one span each, which goes on with the trace of the caller. Never any texts.

Names are those of OpenTelemetry's conventions for HTTP and for generative AI; what these do not know begins with
`phalanx.`. The standard variables of OpenTelemetry's SDK (OTEL_TRACES_SAMPLER, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_SERVICE_NAME, ...) work as its own pages describe them.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from phalanx import __version__
from phalanx.engine.request import RequestOutput
from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import PhalanxError

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import SpanProcessor

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]
Operation = Literal["chat", "text_completion"]

TRACES_PATH = "/v1/traces"
EXPORT_S = 10.0  # most that one batch may take, with all retries


class Span:
    """One request on its way. This one tells nobody."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Something happened just now, such as `first_token`."""

    def end(self, status: int, attributes: Attributes | None = None, *, error: str | None = None) -> None:
        """The request was answered with this HTTP status. error: a word for what went wrong."""


class Tracing:
    """Where spans are begun. This one traces nothing, at no cost; `to` makes one that does."""

    _span = Span()

    @staticmethod
    def to(endpoint: str | None) -> Tracing:
        """Sends spans to an OTLP/HTTP collector: `http://host:4318`, or its whole URL where the path is another than
        `/v1/traces`. None: nothing is traced.

        PhalanxError where the endpoint is no such URL, or OpenTelemetry is not installed.
        """
        if endpoint is None:
            return Tracing()
        url = _traces_url(endpoint)
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise PhalanxError(
                f"traces are to be sent to {endpoint}, and {error.name} is not installed; install it with "
                "`pip install 'phalanx[otel]'`, or configure no endpoint"
            ) from None
        return OtelTracing(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=EXPORT_S)))

    def start(self, name: str, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        """A span of this name that goes on with the `traceparent` in a request's headers, if there is a valid one."""
        return self._span

    def close(self, timeout_s: float = 5.0) -> bool:
        """Sends what has not been sent; whether that was done in time. Blocks; spans that end later are lost."""
        return True


def request_attributes(
    operation: Operation, model: str, params: SamplingParams, *, response_id: str, stream: bool
) -> dict[str, Value]:
    """What a span says of a request at its start. Stop strings are texts of the caller's, and left out."""
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "phalanx",
        "gen_ai.request.model": model,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.stream": stream,
        "gen_ai.response.id": response_id,
    }
    if params.seed is not None:
        attributes["gen_ai.request.seed"] = params.seed
    return attributes


def response_attributes(
    outputs: Sequence[RequestOutput], *, queue_s: float | None = None, first_token_s: float | None = None
) -> dict[str, Value]:
    """What a span says of a request at its end. outputs: of its prompts. queue_s, first_token_s: seconds from its
    arrival to when it began to run, and to its first token.
    """
    completions = [completion for output in outputs for completion in output.completions]
    attributes: dict[str, Value] = {
        "gen_ai.usage.input_tokens": sum(len(output.prompt_token_ids) for output in outputs),
        "gen_ai.usage.cache_read.input_tokens": sum(output.num_cached_tokens for output in outputs),
        "gen_ai.usage.output_tokens": sum(len(completion.token_ids) for completion in completions),
        "gen_ai.response.finish_reasons": [completion.finish_reason for completion in completions],
    }
    if queue_s is not None:
        attributes["phalanx.queue_time"] = queue_s
    if first_token_s is not None:
        attributes["phalanx.time_to_first_token"] = first_token_s
    return attributes


class OtelTracing(Tracing):
    """Spans by OpenTelemetry's SDK. Its provider is this object's own, not the global one of the process."""

    def __init__(self, processor: SpanProcessor) -> None:
        from opentelemetry.context import Context
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        named = Resource.create({SERVICE_NAME: "phalanx", SERVICE_VERSION: __version__})
        named = named.merge(OTELResourceDetector().detect())  # what operators say in OTEL_* comes before our own
        self._provider = TracerProvider(resource=named, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("phalanx", __version__)
        self._callers = TraceContextTextMapPropagator()
        self._nothing = Context()  # whatever else is traced in this process is not what a request belongs to
        self._kind, self._error = SpanKind.SERVER, StatusCode.ERROR

    def start(self, name: str, headers: Mapping[str, str], attributes: Attributes | None = None) -> Span:
        context = self._callers.extract(headers, self._nothing)
        return _OtelSpan(self._tracer.start_span(name, context, self._kind, attributes), self._error)

    def close(self, timeout_s: float = 5.0) -> bool:
        # The SDK's own limits are half a minute and more, and cannot be set.
        closing = threading.Thread(target=self._provider.shutdown, name="phalanx-tracing-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
        return not closing.is_alive()


class _OtelSpan(Span):
    def __init__(self, span: trace.Span, error: trace.StatusCode) -> None:
        self._span = span
        self._error = error

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes)

    def end(self, status: int, attributes: Attributes | None = None, *, error: str | None = None) -> None:
        span = self._span
        span.set_attribute("http.response.status_code", status)
        if attributes is not None:
            span.set_attributes(attributes)
        if error is not None or status >= 500:
            span.set_attribute("error.type", error or str(status))
            if not 400 <= status < 500:  # by the conventions, a client's mistake is no error of a server's span
                span.set_status(self._error)
        span.end()


def _traces_url(endpoint: str) -> str:
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        usable = False
    if not usable:
        raise PhalanxError(
            f"{endpoint!r} is not where traces can be sent; allowed: the URL of an OTLP/HTTP collector, such as "
            "http://localhost:4318"
        )
    return parts._replace(path=TRACES_PATH).geturl() if parts.path in {"", "/"} else endpoint
