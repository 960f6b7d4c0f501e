"""Spans of requests: what they say, whose trace they go on with, and how they reach a collector."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx import __version__
from phalanx.engine.request import Completion, RequestOutput, Timings
from phalanx.engine.sampling_params import SamplingParams
from phalanx.errors import PhalanxError
from phalanx.serve.tracing import OtelTracing, Tracing, request_attributes, response_attributes

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="needs OpenTelemetry: the extra `otel`")

from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes
from opentelemetry.trace import SpanKind, StatusCode

TIMINGS = Timings(queued_s=0.1, time_to_first_token_s=0.2, time_per_output_token_s=0.3)
TRACE_ID, SPAN_ID = 0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7
CALLER = {"traceparent": f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01", "tracestate": "vendor=1"}


class Memory:
    """Tracing that keeps its spans here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = OtelTracing(SimpleSpanProcessor(self._exporter))

    def span(self) -> ReadableSpan:
        """Takes the only one that has ended."""
        (span,) = self._exporter.get_finished_spans()
        self._exporter.clear()
        return span

    def num_spans(self) -> int:
        return len(self._exporter.get_finished_spans())


@pytest.fixture(scope="module")
def memory() -> Memory:
    return Memory()


def output(num_prompt: int, *num_tokens: int) -> RequestOutput:
    """A finished request whose texts are secrets, with completions of so many tokens."""
    completions = tuple(
        Completion(tuple(range(number)), "secret", "stop" if number < 9 else "length", TIMINGS) for number in num_tokens
    )
    return RequestOutput(0, "secret", tuple(range(num_prompt)), completions, num_cached_tokens=num_prompt - 1)


# A span


def test_a_request_is_a_span_of_a_server(memory: Memory) -> None:
    span = memory.tracing.start("chat model", {}, {"gen_ai.request.model": "model"})
    assert memory.num_spans() == 0
    span.event("first_token", {"phalanx.time_to_first_token": 0.25})
    span.end(200, {"gen_ai.usage.output_tokens": 7})
    found = memory.span()
    assert (found.name, found.kind, found.status.status_code) == ("chat model", SpanKind.SERVER, StatusCode.UNSET)
    assert found.attributes == {
        "gen_ai.request.model": "model",
        "gen_ai.usage.output_tokens": 7,
        "http.response.status_code": 200,
    }
    (event,) = found.events
    assert (event.name, event.attributes) == ("first_token", {"phalanx.time_to_first_token": 0.25})


def test_operators_may_name_the_service_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "chat-eu")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    memory = Memory()
    memory.tracing.start("chat", {}).end(200)
    named = memory.span().resource.attributes
    assert (named["service.name"], named["service.version"]) == ("chat-eu", __version__)
    assert named["deployment.environment.name"] == "test"


def test_a_span_goes_on_with_the_trace_of_its_caller(memory: Memory) -> None:
    memory.tracing.start("chat", CALLER).end(200)
    found = memory.span()
    assert found.parent is not None
    assert (found.parent.trace_id, found.parent.span_id, found.parent.is_remote) == (TRACE_ID, SPAN_ID, True)
    assert found.context.trace_id == TRACE_ID
    assert found.context.trace_state == {"vendor": "1"}


def test_a_request_without_a_caller_begins_a_trace(memory: Memory) -> None:
    memory.tracing.start("chat", {}).end(200)
    assert memory.span().parent is None


def test_what_its_caller_does_not_record_is_not_recorded(memory: Memory) -> None:
    span = memory.tracing.start("chat", {"traceparent": CALLER["traceparent"][:-1] + "0"})
    span.event("first_token")
    span.end(500, {"x": 1}, error="engine_failed")
    assert memory.num_spans() == 0


@given(st.text(), st.text() | st.just(CALLER["tracestate"]))
def test_headers_that_make_no_sense_begin_a_trace(memory: Memory, traceparent: str, tracestate: str) -> None:
    memory.tracing.start("chat", {"traceparent": traceparent, "tracestate": tracestate}).end(200)
    assert memory.span().parent is None


@given(st.text())
def test_any_tracestate_is_survived(memory: Memory, tracestate: str) -> None:
    memory.tracing.start("chat", CALLER | {"tracestate": tracestate}).end(200)
    assert memory.span().context.trace_id == TRACE_ID


def test_another_trace_of_this_process_is_not_a_requests_own(memory: Memory) -> None:
    with TracerProvider(shutdown_on_exit=False).get_tracer("other").start_as_current_span("other"):
        memory.tracing.start("chat", {}).end(200)
    assert memory.span().parent is None


def test_the_provider_of_the_process_is_left_alone(memory: Memory) -> None:
    memory.tracing.start("chat", {}).end(200)
    with trace.get_tracer("other").start_as_current_span("other"):
        pass
    assert memory.num_spans() == 1
    memory.span()


@pytest.mark.parametrize(
    ("status", "error", "told", "failed"),
    [
        (200, None, None, False),
        (429, None, None, False),
        (429, "queue_full", "queue_full", False),
        (503, None, "503", True),
        (503, "engine_failed", "engine_failed", True),
        (200, "engine_failed", "engine_failed", True),
    ],
)
def test_a_span_has_failed_by_what_the_server_got_wrong(
    memory: Memory, status: int, error: str | None, told: str | None, failed: bool
) -> None:
    memory.tracing.start("chat", {}).end(status, error=error)
    found = memory.span()
    assert found.attributes is not None
    assert found.attributes["http.response.status_code"] == status
    assert found.attributes.get("error.type") == told
    assert (found.status.status_code is StatusCode.ERROR) == failed


# Attributes


def test_attributes_have_the_names_of_the_conventions() -> None:
    request = request_attributes("chat", "model", SamplingParams(seed=3), response_id="id", stream=True)
    response = response_attributes([output(3, 4)], queue_s=0.1, first_token_s=0.2)
    conventions = {value for name, value in vars(gen_ai_attributes).items() if name.startswith("GEN_AI_")}
    own = {name for name in request | response if name not in conventions}
    assert own == {"phalanx.queue_time", "phalanx.time_to_first_token"}
    assert http_attributes.HTTP_RESPONSE_STATUS_CODE == "http.response.status_code"
    assert error_attributes.ERROR_TYPE == "error.type"


def test_a_request_is_described_by_its_parameters() -> None:
    params = SamplingParams(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=40, frequency_penalty=0.1, presence_penalty=0.2, n=2, seed=3
    )
    assert request_attributes("text_completion", "model", params, response_id="cmpl-1", stream=False) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "phalanx",
        "gen_ai.request.model": "model",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 40,
        "gen_ai.request.frequency_penalty": 0.1,
        "gen_ai.request.presence_penalty": 0.2,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.seed": 3,
        "gen_ai.request.stream": False,
        "gen_ai.response.id": "cmpl-1",
    }


def test_a_seed_that_the_engine_chooses_is_not_told() -> None:
    attributes = request_attributes("chat", "model", SamplingParams(), response_id="id", stream=True)
    assert "gen_ai.request.seed" not in attributes


def test_usage_is_of_all_prompts_and_completions_together() -> None:
    assert response_attributes([output(3, 4, 9), output(5, 6)], queue_s=0.5, first_token_s=0.75) == {
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.cache_read.input_tokens": 6,
        "gen_ai.usage.output_tokens": 19,
        "gen_ai.response.finish_reasons": ["stop", "length", "stop"],
        "phalanx.queue_time": 0.5,
        "phalanx.time_to_first_token": 0.75,
    }


def test_times_that_did_not_come_are_left_out() -> None:
    assert not [name for name in response_attributes([]) if name.startswith("phalanx.")]


def test_no_text_of_a_request_is_told(memory: Memory) -> None:
    params = SamplingParams(stop=("secret",))
    span = memory.tracing.start("chat", {}, request_attributes("chat", "m", params, response_id="id", stream=True))
    span.end(200, response_attributes([output(3, 4)]))
    assert "secret" not in memory.span().to_json()


# Without a collector


def test_without_an_endpoint_nothing_is_traced_and_nothing_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)
    tracing = Tracing.to(None)
    span = tracing.start("chat", CALLER, {"a": 1})
    assert span is tracing.start("another", {})
    span.event("first_token")
    span.end(500, {"b": 2}, error="engine_failed")
    assert tracing.close()


def test_an_endpoint_without_opentelemetry_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(PhalanxError, match=r"pip install 'phalanx\[otel\]'"):
        Tracing.to("http://localhost:4318")


@pytest.mark.parametrize("endpoint", ["", "localhost:4318", "grpc://localhost:4317", "http://", "http://host:http/"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(PhalanxError, match="allowed: the URL of an OTLP/HTTP collector"):
        Tracing.to(endpoint)


# With a collector


class Collector(ThreadingHTTPServer):
    """Keeps what is sent to it; answers when `answering` is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), CollectorHandler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.answering = threading.Event()
        self.received: list[tuple[str, ExportTraceServiceRequest]] = []


class CollectorHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        collector = self.server
        assert isinstance(collector, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        collector.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        collector.answering.wait()
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.answering.set()
        server.shutdown()
        thread.join()


def test_closing_sends_what_has_ended(collector: Collector) -> None:
    collector.answering.set()
    tracing = Tracing.to(collector.url)
    attributes = request_attributes("chat", "model", SamplingParams(max_tokens=9), response_id="id", stream=True)
    span = tracing.start("chat model", CALLER, attributes)
    span.event("first_token")
    span.end(200, response_attributes([output(3, 4)], first_token_s=0.5))
    assert tracing.close(60.0)

    ((_, request),) = collector.received
    (resource,) = request.resource_spans
    named = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert (named["service.name"], named["service.version"]) == ("phalanx", __version__)
    (found,) = resource.scope_spans[0].spans
    assert found.name == "chat model"
    assert found.trace_id == TRACE_ID.to_bytes(16, "big")
    assert found.parent_span_id == SPAN_ID.to_bytes(8, "big")
    assert [event.name for event in found.events] == ["first_token"]
    values = {attribute.key: attribute.value for attribute in found.attributes}
    assert values["gen_ai.request.max_tokens"].int_value == 9
    assert values["gen_ai.usage.output_tokens"].int_value == 4
    assert values["phalanx.time_to_first_token"].double_value == 0.5


@pytest.mark.parametrize(
    ("path", "asked"), [("", "/v1/traces"), ("/", "/v1/traces"), ("/v1/traces", "/v1/traces"), ("/otlp/in", "/otlp/in")]
)
def test_a_collector_is_named_with_or_without_a_path(collector: Collector, path: str, asked: str) -> None:
    collector.answering.set()
    tracing = Tracing.to(collector.url + path)
    tracing.start("chat", {}).end(200)
    assert tracing.close(60.0)
    assert [found for found, _ in collector.received] == [asked]


def test_closing_does_not_wait_for_a_collector_that_hangs(collector: Collector) -> None:
    tracing = Tracing.to(collector.url)
    tracing.start("chat", {}).end(200)
    assert not tracing.close(0.2)
