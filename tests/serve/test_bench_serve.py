"""`phalanx bench serve`: how it reads streams, what its figures mean, and that it finds the knee of a known server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from phalanx.cli import app
from phalanx.errors import ConfigError, PhalanxError, RequestError
from phalanx.launcher.bench.readings import LatencyLimits, RequestReading
from phalanx.launcher.bench.workloads import RequestShape
from phalanx.serve.bench import points as bench_points
from phalanx.serve.bench.client import WORDS, Answer, Failure, HttpClient, RequestForm, api_root, num_requests
from phalanx.serve.bench.lengths import LengthPair, RequestSource, read_lengths
from phalanx.serve.bench.points import (
    ClientCost,
    HttpReading,
    Point,
    client_is_late,
    falls_behind,
    notes,
    read_answer,
    read_figures,
    token_times,
)
from phalanx.serve.bench.sse import EventLines, Usage, error_message, read_chunk
from phalanx.serve.bench.sweep import Judged, knee, next_rate

LIMITS = LatencyLimits(time_to_first_token_s=1.0, time_per_output_token_s=0.5)
PNG = b"\x89PNG\r\n\x1a\n"
VOCAB = 5000


# ---- streams ----


@given(
    st.lists(st.text("abc ü,{}", max_size=8), max_size=10),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.integers(0, 400), max_size=12),
)
def test_events_are_the_same_however_the_stream_is_cut(texts: list[str], newline: str, cuts: list[int]) -> None:
    stream = "".join(f": waiting{newline}data: {json.dumps(text)}{newline}{newline}" for text in texts).encode()
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    lines, found = EventLines(), []
    for start, end in pairwise(places):
        found += lines.feed(stream[start:end])
    assert [json.loads(event) for event in found] == texts


def test_other_fields_of_events_are_passed_over() -> None:
    assert EventLines().feed(b'event: message\nid: 3\ndata:{"choices":[]}\nretry: 10\n\n') == [b'{"choices":[]}']


@pytest.mark.parametrize(
    ("choice", "has_token"),
    [
        ({"text": " word", "finish_reason": None}, True),
        ({"text": "", "finish_reason": None}, True),  # half a character, say
        ({"text": " end", "finish_reason": "length"}, True),
        ({"text": "", "finish_reason": "length"}, False),
        ({"delta": {"role": "assistant", "content": ""}}, False),
        ({"delta": {"role": "assistant", "content": None}, "finish_reason": None}, False),
        ({"delta": {"role": "assistant", "content": "a"}}, True),
        ({"delta": {"content": ""}}, True),
        ({"delta": {"reasoning_content": "hm"}, "finish_reason": "stop"}, True),
        ({"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": "tool_calls"}, True),
        ({"delta": {}, "finish_reason": "stop"}, False),
    ],
)
def test_a_chunk_counts_when_it_brings_output(choice: dict[str, Any], has_token: bool) -> None:
    chunk = read_chunk(json.dumps({"id": "x", "choices": [{"index": 0, **choice}], "usage": None}).encode())
    assert chunk.has_token is has_token
    assert chunk.finish_reason == choice.get("finish_reason")


def test_the_chunk_with_the_usage_is_no_output() -> None:
    chunk = read_chunk(b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}}')
    assert not chunk.has_token
    assert chunk.usage == Usage(7, 3)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too\\n long", "type": "x"}}', "too long"),
        (b'{"error": "no"}', "no"),
        (b'{"object": "error", "message": "bad"}', "bad"),
        (b"<html>Bad  gateway</html>", "<html>Bad gateway</html>"),
        (b"\xff", "\ufffd"),
        (b"[1]", "[1]"),
    ],
)
def test_the_message_of_an_error_is_found(body: bytes, message: str) -> None:
    assert error_message(body) == message


# ---- requests ----


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://host:8000", "http://host:8000"),
        ("http://host:8000/v1/", "http://host:8000"),
        ("https://host/prefix/v1", "https://host/prefix"),
        ("localhost:8000", "http://localhost:8000"),
        ("[::1]:80", "http://[::1]:80"),
    ],
)
def test_an_address_may_end_in_v1_or_not(url: str, root: str) -> None:
    assert api_root(url) == root


@pytest.mark.parametrize("url", ["", "http://", "ftp://host", "http://host:port", "http://host?x=1", "http://[::1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="http://HOST:PORT"):
        api_root(url)


def test_a_request_has_token_ids_and_asks_for_the_usage_and_all_its_tokens() -> None:
    body = json.loads(RequestForm("m").body(RequestShape((5, 6), 9)))
    assert body["prompt"] == [5, 6]
    assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("m", 9, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_chats_and_texts_are_of_as_many_words_as_the_prompt_has_tokens() -> None:
    shape = RequestShape((0, 1, len(WORDS)), 9)
    words = f"{WORDS[0]} {WORDS[1]} {WORDS[0]}"
    assert json.loads(RequestForm("m", words=True).body(shape))["prompt"] == words
    chat = json.loads(RequestForm("m", chat=True, ignore_eos=False).body(shape))
    assert chat["messages"] == [{"role": "user", "content": words}]
    assert "ignore_eos" not in chat


# ---- lengths ----

PAIRS = (LengthPair(3, 7), LengthPair(20, 2), LengthPair(11, 5))
JSON_LINES = '{"prompt_tokens": 3, "output_tokens": 7}\n\n{"output_tokens": 2, "prompt_tokens": 20, "at": 1}\n'
CSV = "time, output_tokens, prompt_tokens\r\n1, 7, 3\r\n\r\n2, 2, 20\r\n"


def lengths_file(folder: Path, text: str) -> Path:
    path = folder / "lengths"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("text", [JSON_LINES, CSV, "\ufeff" + JSON_LINES])
def test_lengths_are_read_from_json_lines_and_from_csv(tmp_path: Path, text: str) -> None:
    assert read_lengths(lengths_file(tmp_path, text)) == PAIRS[:2]


def test_all_bad_lines_are_told_at_once(tmp_path: Path) -> None:
    good, bad = '{"prompt_tokens": 3, "output_tokens": 7}', ["[1]", '{"prompt_tokens": 3}', "{", '{"prompt_tokens": 0}']
    with pytest.raises(ConfigError) as caught:
        read_lengths(lengths_file(tmp_path, "\n".join([good, bad[0], "", *bad[1:]])))
    assert [(problem.line, problem.found) for problem in caught.value.problems] == [
        (line, found) for line, found in zip((2, 4, 5, 6), bad, strict=True)
    ]
    assert "output_tokens" in str(caught.value)


def test_bad_lines_of_csv_are_told_with_their_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_lengths(lengths_file(tmp_path, "prompt_tokens,output_tokens\n1,2\n3\n4,x\n5,-1\n"))
    assert [problem.line for problem in caught.value.problems] == [3, 4, 5]


@pytest.mark.parametrize("text", ["", "\n\n", "prompt_tokens,output_tokens\n", "1,2\n3,4\n", "prompt,output\n1,2\n"])
def test_a_file_without_lengths_is_refused_with_what_would_do(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="prompt_tokens,output_tokens"):
        read_lengths(lengths_file(tmp_path, text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lengths(tmp_path / "missing")


def lengths_of(shapes: Sequence[RequestShape]) -> list[tuple[int, int]]:
    return [(len(shape.prompt), shape.max_tokens) for shape in shapes]


def test_requests_have_the_pairs_of_the_file_in_equal_parts() -> None:
    found = lengths_of(RequestSource(VOCAB, PAIRS).draw(1.0, 3000, 0))
    for pair in PAIRS:
        assert 850 < found.count((pair.prompt_tokens, pair.output_tokens)) < 1150


@pytest.mark.parametrize("pairs", [PAIRS, ()])
def test_every_rate_sends_the_same_lengths_in_other_prompts(pairs: tuple[LengthPair, ...]) -> None:
    source = RequestSource(VOCAB, pairs, seed=4)
    slow, fast = source.draw(1.0, 50, 1), source.draw(10.0, 80, 2)
    assert lengths_of(slow) == lengths_of(fast)[:50]
    assert all(one.prompt != other.prompt for one, other in zip(slow, fast, strict=False))
    assert all(0 <= token < VOCAB for shape in fast for token in shape.prompt)
    assert [shape.arrival_s for shape in slow] == pytest.approx([10 * shape.arrival_s for shape in fast[:50]])
    assert source.draw(1.0, 50, 1) == slow
    assert RequestSource(VOCAB, pairs, seed=5).draw(1.0, 50, 1) != slow


def test_scale_shortens_all_lengths() -> None:
    found = lengths_of(RequestSource(VOCAB, (LengthPair(100, 40),), scale=0.5).draw(1.0, 2, 0))
    assert found == [(50, 20)] * 2


# ---- figures ----

NO_COST = ClientCost(elapsed_s=1.0, cpu_s=0.1, num_chunks=10)
REFUSED = Failure("HTTP 429", "busy")


def served(arrival_s: float, *token_s: float, sent_s: float | None = None, asked: int = 0) -> HttpReading:
    reading = RequestReading(10, arrival_s, token_s)
    return HttpReading(arrival_s, arrival_s if sent_s is None else sent_s, asked or len(token_s), reading, None)


def failed(arrival_s: float, failure: Failure = REFUSED) -> HttpReading:
    return HttpReading(arrival_s, arrival_s, 5, None, failure)


def point_of(readings: Sequence[HttpReading], rate: float = 1.0, cost: ClientCost = NO_COST) -> Point:
    return Point(rate, len(readings), tuple(readings), cost)


def test_latencies_are_from_when_a_request_was_due_not_from_when_it_was_sent() -> None:
    answer = Answer((107.0, 108.0, 109.0), Usage(4, 3), None)
    reading = read_answer(answer, RequestShape((1, 2), 3, arrival_s=5.0), began_s=100.0, sent_s=106.5)
    assert reading.late_s == 1.5
    assert reading.served == RequestReading(4, 5.0, (7.0, 8.0, 9.0))
    figures = read_figures(point_of([reading]), LIMITS)
    assert figures.time_to_first_token_p50_s == 2.0
    assert figures.end_to_end_p99_s == 4.0


@pytest.mark.parametrize(
    ("num_tokens", "times"),
    [(3, [1.0, 2.0, 3.0]), (5, [1.0, 2.0, 3.0, 3.0, 3.0]), (2, [1.0, 3.0]), (1, [3.0])],
)
def test_tokens_are_as_many_as_the_server_counts(num_tokens: int, times: list[float]) -> None:
    assert token_times([1.0, 2.0, 3.0], num_tokens) == times


def test_a_server_that_counts_no_tokens_is_taken_to_send_one_a_chunk() -> None:
    reading = read_answer(Answer((1.0, 2.0), None, None), RequestShape((1, 2), 2), began_s=0.0, sent_s=0.0)
    assert reading.served == RequestReading(2, 0.0, (1.0, 2.0))


@given(st.lists(st.lists(st.floats(0.001, 10), min_size=1, max_size=6), min_size=1, max_size=30))
def test_percentiles_are_those_of_numpy(waits: list[list[float]]) -> None:
    """waits: of each request, to the first token and between the others."""
    readings = [served(place, *list(accumulate([place, *each]))[1:]) for place, each in enumerate(waits)]
    figures = read_figures(point_of(readings), LIMITS)
    first, total = [each[0] for each in waits], [sum(each) for each in waits]
    means, gaps = [np.mean(each[1:]) for each in waits if len(each) > 1], [gap for each in waits for gap in each[1:]]
    assert figures.time_to_first_token_p50_s == pytest.approx(np.percentile(first, 50))
    assert figures.time_to_first_token_p99_s == pytest.approx(np.percentile(first, 99))
    assert figures.end_to_end_p50_s == pytest.approx(np.percentile(total, 50))
    assert figures.end_to_end_p99_s == pytest.approx(np.percentile(total, 99))
    if gaps:
        assert figures.time_per_output_token_p50_s == pytest.approx(np.percentile(means, 50))
        assert figures.time_per_output_token_p99_s == pytest.approx(np.percentile(means, 99))
        assert figures.time_between_tokens_p99_s == pytest.approx(np.percentile(gaps, 99))
    else:
        assert figures.time_per_output_token_p50_s is figures.time_between_tokens_p99_s is None


def arrivals(rate: float, num: int, seed: int = 0) -> list[float]:
    source = random.Random(seed)
    return list(accumulate(source.expovariate(rate) for _ in range(num)))


def test_a_long_wait_for_the_last_request_is_not_taken_for_falling_behind() -> None:
    *times, last = arrivals(10, 100)
    readings = [*(served(when, when + 0.1, when + 0.5) for when in times), served(last, last + 0.1, last + 9.0)]
    figures = read_figures(point_of(readings), LIMITS)
    assert figures.completed_per_s == pytest.approx(figures.arrived_per_s)
    assert falls_behind(point_of(readings), LIMITS) is None


def queue(times: Sequence[float], service_s: float) -> list[HttpReading]:
    """One server that serves a request after the other, with a token halfway and one at the end."""
    free_s, readings = 0.0, []
    for when in times:
        free_s = max(free_s, when) + service_s
        readings.append(served(when, free_s - service_s / 2, free_s))
    return readings


def test_a_server_that_takes_less_than_arrives_falls_behind() -> None:
    point = point_of(queue(arrivals(10, 200), service_s=0.125))
    figures = read_figures(point, LatencyLimits(1e9, 1e9))
    assert figures.completed_per_s == pytest.approx(8.0, rel=0.01)
    assert figures.output_tokens_per_s == pytest.approx(16.0, rel=0.01)
    reason = falls_behind(point, LatencyLimits(1e9, 1e9))
    assert reason is not None
    assert "requests/s completed of" in reason


def test_a_server_that_takes_as_much_as_arrives_does_not_fall_behind() -> None:
    point = point_of(queue(arrivals(10, 200), service_s=0.05))
    assert falls_behind(point, LIMITS) is None


def test_goodput_leaves_out_what_is_beyond_the_limits_and_failures_are_beyond_them() -> None:
    good = [served(when, when + 0.5, when + 1.0) for when in range(10)]
    slow = [served(when, when + 0.5, when + 1.25) for when in range(10, 14)]
    point = point_of([*good, *slow, *(failed(when) for when in range(14, 16))])
    figures = read_figures(point, LIMITS)
    assert figures.share_within_limits == 10 / 16
    assert figures.completed_per_s is not None
    assert figures.goodput_per_s == pytest.approx(figures.completed_per_s * 10 / 14)
    assert "62% of the requests within the limits" in str(falls_behind(point, LIMITS))


def test_a_point_with_nothing_served_has_no_latencies_and_falls_behind() -> None:
    point = point_of([failed(0.0), failed(1.0)])
    figures = read_figures(point, LIMITS)
    assert figures.completed_per_s is figures.time_to_first_token_p50_s is figures.output_tokens_per_s is None
    assert falls_behind(point, LIMITS) is not None


def test_failures_are_counted_by_kind_the_most_frequent_first() -> None:
    lost = Failure("disconnected", "gone")
    point = point_of([failed(0.0, lost), failed(1.0), failed(2.0), served(3.0, 4.0)])
    assert {kind: len(each) for kind, each in point.failures.items()} == {"HTTP 429": 2, "disconnected": 1}
    assert list(point.failures) == ["HTTP 429", "disconnected"]


def test_a_client_that_is_late_or_busy_is_told() -> None:
    on_time = [served(when, when + 0.2) for when in range(100)]
    late = [served(when, when + 0.2, sent_s=when + 0.05) for when in range(100)]
    assert client_is_late(point_of(on_time)) is None
    assert "50 ms" in str(client_is_late(point_of(late)))
    assert "busy 90%" in str(client_is_late(point_of(on_time, cost=ClientCost(10.0, 9.0, 100))))


def test_arrivals_shorter_than_requests_are_told_to_be_no_steady_state() -> None:
    short = [served(0.1 * place, 0.1 * place + 0.5, 0.1 * place + 3.0) for place in range(10)]
    assert any("raise --duration" in note for note in notes(point_of(short)))
    assert notes(point_of([served(when, when + 0.5) for when in range(10)])) == []


def test_outputs_shorter_than_asked_for_are_told() -> None:
    readings = [served(when, when + 0.5, asked=4 if when < 3 else 1) for when in range(10)]
    assert notes(point_of(readings)) == ["3 requests got fewer tokens than they asked for"]


# ---- the sweep ----


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e3))
def test_a_sweep_brackets_the_capacity(capacity: float, start: float) -> None:
    judged: list[Judged] = []
    while (rate := next_rate(judged, start)) is not None:
        assert rate not in [each.rate_per_s for each in judged]
        judged.append(Judged(rate, rate <= capacity))
    fine = [each.rate_per_s for each in judged if each.kept_up]
    too_much = [each.rate_per_s for each in judged if not each.kept_up]
    assert len(judged) <= 16
    if not fine:
        assert capacity < start / 16
    elif not too_much:
        assert capacity >= start * 2**15
    elif len(judged) < 16:
        assert min(too_much) / max(fine) < 1.4


def test_a_sweep_doubles_then_halves_the_gap() -> None:
    judged: list[Judged] = []
    while (rate := next_rate(judged, 1.0)) is not None:
        judged.append(Judged(rate, rate <= 5.0))
    assert [each.rate_per_s for each in judged] == [1.0, 2.0, 4.0, 8.0, 5.7, 4.8]


def test_the_knee_is_below_every_rate_that_was_too_much() -> None:
    def kept(rate: float) -> Point:
        return point_of(queue(arrivals(rate, 50), 0.1 / rate), rate)

    def too_much(rate: float) -> Point:
        return point_of(queue(arrivals(rate, 50), 2 / rate), rate)

    points = [kept(1), kept(8), too_much(4), kept(2)]
    best = knee(points, LatencyLimits(1e9, 1e9))
    assert best is points[3]
    assert knee([too_much(1), kept(2)], LatencyLimits(1e9, 1e9)) is None


def test_what_was_interrupted_is_no_knee() -> None:
    half = Point(2.0, 100, tuple(served(when, when + 0.5) for when in range(10)), NO_COST)
    assert knee([half], LIMITS) is None
    assert "interrupted after 10 of 100 requests" in notes(half)


# ---- a server ----

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


@dataclass
class FakeServer:
    """Serves so many requests at a time, each in `service_s`, its tokens spread evenly. Others wait their turn.

    special: answers a request instead, by its number from 0, where it wants to.
    """

    slots: int = 100
    service_s: float = 0.01
    models: tuple[str, ...] = ("fake",)
    special: Callable[[int], Handler | None] = lambda _: None
    status: Callable[[], dict[str, Any]] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        self._free = asyncio.Semaphore(self.slots)
        site = web.Application(client_max_size=1 << 26)
        site.router.add_get("/v1/models", self._models)
        site.router.add_get("/version", self._version)
        site.router.add_get("/status", self._status)
        site.router.add_post("/v1/completions", self._complete)
        site.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(site, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": "7.1"})

    async def _status(self, request: web.Request) -> web.Response:
        if self.status is None:
            raise web.HTTPNotFound
        return web.json_response(self.status())

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.keys.append(request.headers.get("Authorization"))
        self.bodies.append(body)
        if special := self.special(len(self.bodies) - 1):
            return await special(request, body)
        num, chat = body["max_tokens"], "messages" in body
        async with self._free:
            response = await stream(request)
            if chat:
                await send(response, {"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
            for number in range(num):
                await asyncio.sleep(self.service_s / num)
                text = {"delta": {"content": "a"}} if chat else {"text": "a"}
                await send(response, text | {"finish_reason": "length" if number == num - 1 else None})
        usage = {"prompt_tokens": 11, "completion_tokens": num}
        await response.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\ndata: [DONE]\n\n".encode())
        return response


async def stream(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    return response


async def send(response: web.StreamResponse, choice: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps({'choices': [{'index': 0, **choice}]})}\n\n".encode())


@contextmanager
def running(server: FakeServer) -> Iterator[FakeServer]:
    ready, loop, stop = threading.Event(), asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(server.serve(ready, stop)))
    thread.start()
    ready.wait()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


async def refuse(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    error = {"message": "too many requests", "type": "overloaded"}
    return web.json_response({"error": error}, status=429, headers={"Retry-After": "1"})


async def hang_up(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await send(response, {"text": "a", "finish_reason": None})
    assert request.transport is not None
    request.transport.abort()
    return response


async def stop_short(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await send(response, {"text": "a", "finish_reason": None})
    return response


async def give_up(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await send(response, {"text": "a", "finish_reason": "abort"})
    return response


async def fail_midway(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await response.write(b'data: {"error": {"message": "a rank died"}}\n\n')
    return response


async def say_nothing(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await send(response, {"text": "", "finish_reason": "stop"})
    return response


async def never_end(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await asyncio.sleep(30)
    return response


async def babble(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    response = await stream(request)
    await response.write(b"data: hello\n\n")
    return response


def ask(url: str, max_tokens: int = 4, timeout_s: float = 20.0) -> Answer:
    async def run() -> Answer:
        async with HttpClient(url, timeout_s=timeout_s) as client:
            return await client.complete("/completions", RequestForm("fake").body(RequestShape((1, 2), max_tokens)))

    return asyncio.run(run())


def test_each_token_is_timed_as_it_comes() -> None:
    """The server sends a token when the client has seen the one before, and so knows between which times it came."""
    sent_s: list[float] = []
    clients: list[HttpClient] = []

    async def in_turn(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await stream(request)
        for number in range(4):
            while clients[0].num_chunks < number:
                await asyncio.sleep(0.001)
            sent_s.append(time.perf_counter())
            await send(response, {"text": "a", "finish_reason": "length" if number == 3 else None})
        return response

    async def follow(url: str) -> Answer:
        async with HttpClient(url) as client:
            clients.append(client)
            return await client.complete("/completions", RequestForm("fake").body(RequestShape((1, 2), 4)))

    with running(FakeServer(special=lambda _: in_turn)) as server:
        answer = asyncio.run(follow(server.url))
    assert answer.failure is None
    assert len(answer.chunk_s) == 4
    times = [when for pair in zip(sent_s, answer.chunk_s, strict=True) for when in pair]
    assert times == sorted(times)


def test_the_usage_is_what_the_server_says() -> None:
    with running(FakeServer()) as server:
        assert ask(server.url).usage == Usage(11, 4)


@pytest.mark.parametrize(
    ("handler", "kind", "message"),
    [
        (refuse, "HTTP 429", "too many requests"),
        (hang_up, "disconnected", "after 1 chunks"),
        (stop_short, "cut short", "without a finish reason after 1 chunks"),
        (give_up, "cut short", "as 'abort'"),
        (fail_midway, "error in the stream", "a rank died"),
        (say_nothing, "no tokens", "without any output"),
        (babble, "not understood", "malformed"),
    ],
)
def test_what_goes_wrong_is_in_the_answer(handler: Handler, kind: str, message: str) -> None:
    with running(FakeServer(special=lambda _: handler)) as server:
        failure = ask(server.url).failure
    assert failure is not None
    assert failure.kind == kind
    assert message in failure.message


def test_a_request_without_end_is_a_time_out() -> None:
    with running(FakeServer(special=lambda _: never_end)) as server:
        failure = ask(server.url, timeout_s=0.3).failure
    assert failure == Failure("time-out", "not finished after 0.3 s, 0 chunks had come")


def test_a_server_is_drained_when_no_replica_has_requests() -> None:
    left = iter([3, 2, 0])

    def status() -> dict[str, Any]:
        return {"replicas": [{"running": 0, "waiting": 0}, {"running": next(left), "waiting": 0}]}

    async def drained(url: str, timeout_s: float) -> bool:
        async with HttpClient(url) as client:
            return await client.drained(timeout_s)

    with running(FakeServer(status=status)) as server:
        assert asyncio.run(drained(server.url, 20.0))
        assert next(left, None) is None
    with running(FakeServer(status=lambda: {"replicas": [{"running": 1, "waiting": 0}]})) as server:
        assert not asyncio.run(drained(server.url, 0.0))
    with running(FakeServer()) as server:  # which does not tell
        assert asyncio.run(drained(server.url, 0.0))


@pytest.mark.parametrize("status", [{}, {"replicas": 3}, {"replicas": [{"running": "x"}]}])
def test_another_kind_of_status_says_nothing(status: dict[str, Any]) -> None:
    assert num_requests(status) == 0


# ---- the command ----

LENGTHS = '{"prompt_tokens": 3, "output_tokens": 2}\n'


def phalanx(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "serve", *map(str, arguments)])


def quick(url: str, folder: Path, *options: object) -> Result:
    """One rate, few and short requests."""
    path = lengths_file(folder, LENGTHS)
    return phalanx(url, "--lengths", path, "--rate", 200, "--num-requests", 20, *options)


CAPACITY = 3 / 0.02


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """A sweep over a server of 150 requests/s at most, and the directory with what it wrote."""
    folder = tmp_path_factory.mktemp("out")
    path = lengths_file(folder, LENGTHS)
    files = ("--json", folder / "out.json", "--plot", folder / "out.png")
    with running(FakeServer(slots=3, service_s=0.02)) as server:
        result = phalanx(server.url, "--lengths", path, "--num-requests", 50, "--seed", 3, *files)
    assert result.exit_code == 0, f"{result.exception} {result.stderr}"
    return result, folder


@pytest.fixture(scope="module")
def report(swept: tuple[Result, Path]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((swept[1] / "out.json").read_text())
    return data


@pytest.mark.alone
def test_the_knee_of_a_known_server_is_found(report: dict[str, Any]) -> None:
    rates = {point["rate_per_s"]: point["falls_behind"] for point in report["points"]}
    found = report["knee"]["rate_per_s"]
    most = max(point["figures"]["completed_per_s"] for point in report["points"])
    assert most < CAPACITY * 1.1
    assert most / 2.5 < found < CAPACITY * 1.3  # on a busy machine the server takes less than it could
    assert rates[found] is None
    assert any(rate > found and why for rate, why in rates.items())


def test_the_json_has_every_reading_its_figures_are_made_of(report: dict[str, Any]) -> None:
    for point in report["points"]:
        requests, figures = point["requests"], point["figures"]
        assert len(requests) == point["num_planned"] == point["num_served"] == 50
        assert sum(request["output_tokens"] for request in requests) == point["output_tokens"] == 100
        assert point["prompt_tokens"] == 50 * 11  # as the server counts them
        for name, key, percent in (
            ("time_to_first_token_p99_s", "time_to_first_token_s", 99),
            ("time_per_output_token_p50_s", "time_per_output_token_s", 50),
            ("end_to_end_p50_s", "end_to_end_s", 50),
        ):
            assert figures[name] == pytest.approx(np.percentile([request[key] for request in requests], percent))
        assert point["client"]["most_late_s"] == max(each["sent_s"] - each["arrival_s"] for each in requests)
        assert point["client"]["cpu_us_per_chunk"] > 0
        assert point["failures"] == {}


def test_the_json_says_what_was_measured_and_how(report: dict[str, Any], swept: tuple[Result, Path]) -> None:
    assert report["server"]["model"] == "fake"
    assert report["server"]["version"] == "7.1"
    assert {"processor", "num_cores", "gpus", "python", "phalanx", "aiohttp"} == set(report["client_machine"])
    assert report["options"]["lengths"] == "lengths"
    assert (report["options"]["seed"], report["options"]["num_requests"]) == (3, 50)
    assert report["command"].split("{} ".format(report["server"]["url"]))[1] == (
        "--lengths lengths --num-requests 50 --seed 3 --json out.json --plot out.png"
    )
    assert str(swept[1]) not in (swept[1] / "out.json").read_text()


def test_the_table_goes_to_standard_output_and_progress_to_standard_error(swept: tuple[Result, Path]) -> None:
    result, _ = swept
    for part in ("completed, requests/s", "TTFT p99, ms", "ITL p99, ms", "knee: ", "the highest rate measured"):
        assert part in result.stdout
        assert part not in result.stderr
    assert "100% within the limits" in result.stderr


def test_the_plot_is_a_png_with_something_in_it(swept: tuple[Result, Path]) -> None:
    picture = (swept[1] / "out.png").read_bytes()
    assert picture.startswith(PNG)
    assert len(picture) > 20_000


def test_failures_are_counted_and_shown_and_the_rest_is_measured(tmp_path: Path) -> None:
    def special(number: int) -> Handler | None:
        return None if number < 9 else {0: refuse, 1: hang_up}.get(number % 4)  # 9 to warm up

    with running(FakeServer(special=special)) as server:
        result = quick(server.url, tmp_path, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    (point,) = json.loads((tmp_path / "out.json").read_text())["points"]
    assert {kind: each["count"] for kind, each in point["failures"].items()} == {"HTTP 429": 5, "disconnected": 5}
    assert point["num_served"] == 10
    assert point["figures"]["share_within_limits"] == 0.5
    assert "5 x HTTP 429, such as: too many requests" in " ".join(result.stdout.split())


def test_nothing_served_in_the_warm_up_is_an_error_with_address_cause_and_remedy(tmp_path: Path) -> None:
    with running(FakeServer(special=lambda _: refuse)) as server:
        result = quick(server.url, tmp_path)
    assert isinstance(result.exception, PhalanxError)
    for part in (f"{server.url}/v1/completions", "9 x HTTP 429", "too many requests", "try again"):
        assert part in str(result.exception)


def test_what_was_measured_is_shown_when_the_server_fails_later(tmp_path: Path) -> None:
    with running(FakeServer(special=lambda number: None if number < 29 else hang_up)) as server:
        result = quick(server.url, tmp_path, "--rate", 100, "--json", tmp_path / "out.json")
    assert isinstance(result.exception, PhalanxError)
    assert "none of 20 requests" in str(result.exception)
    first, second = json.loads((tmp_path / "out.json").read_text())["points"]
    assert (first["num_served"], second["num_served"]) == (20, 0)
    assert "TTFT" in result.stdout


def test_no_server_is_an_error_that_names_the_address(tmp_path: Path) -> None:
    with running(FakeServer()) as server:
        pass
    for options in ((), ("--model", "fake")):
        result = quick(server.url, tmp_path, *options)
        assert isinstance(result.exception, PhalanxError)
        assert server.url in str(result.exception)


def test_of_several_models_one_must_be_chosen(tmp_path: Path) -> None:
    with running(FakeServer(models=("one", "two"))) as server:
        refused = quick(server.url, tmp_path)
        assert "one, two; choose by --model" in str(refused.exception)
        assert quick(server.url, tmp_path, "--model", "two").exit_code == 0
    assert {body["model"] for body in server.bodies} == {"two"}


def test_the_key_of_a_file_is_sent_and_not_shown(tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("secret-1\nsecret-2\n")
    with running(FakeServer()) as server:
        result = quick(server.url, tmp_path, "--api-key-file", key_file, "--json", tmp_path / "out.json")
    assert result.exit_code == 0
    assert set(server.keys) == {"Bearer secret-1"}
    assert "secret" not in result.output + (tmp_path / "out.json").read_text()


def test_a_key_file_without_a_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("\n")
    assert "has no key" in str(quick("localhost:1", tmp_path, "--api-key-file", tmp_path / "key").exception)


def test_chats_are_measured_from_their_first_word(tmp_path: Path) -> None:
    with running(FakeServer(service_s=0.1)) as server:
        result = quick(server.url + "/v1", tmp_path, "--chat", "--respect-eos", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.exception
    (point,) = json.loads((tmp_path / "out.json").read_text())["points"]
    assert point["output_tokens"] == 2 * 20
    assert point["figures"]["time_to_first_token_p50_s"] >= 0.05  # the role comes at once, the word after half the time
    assert all("messages" in body and "ignore_eos" not in body for body in server.bodies)


def test_each_rate_has_as_many_requests_as_last_for_the_duration(tmp_path: Path) -> None:
    with running(FakeServer()) as server:
        options = ("--rate", 100, "--duration", 0.5, "--json", tmp_path / "out.json")
        assert phalanx(server.url, "--lengths", lengths_file(tmp_path, LENGTHS), "--rate", 20, *options).exit_code == 0
    points = json.loads((tmp_path / "out.json").read_text())["points"]
    assert [(point["rate_per_s"], point["num_planned"]) for point in points] == [(20, 10), (100, 50)]


def test_an_interrupt_shows_what_was_measured_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench_points, "KEEPS_UP", 0.0
    )  # a machine that stalls in the first rate must not end the sweep there

    def special(number: int) -> None:
        if number == 9 + 20 + 10:  # warm-up, the first rate, and half of the second
            os.kill(os.getpid(), signal.SIGINT)

    with running(FakeServer(special=special)) as server:
        result = quick(server.url, tmp_path, "--rate", 20, "--json", tmp_path / "out.json")
    assert result.exit_code == 130
    whole, part = json.loads((tmp_path / "out.json").read_text())["points"]
    assert whole["num_served"] == 20
    assert 0 < part["num_served"] < 20
    assert any("interrupted" in note for note in part["notes"])
    assert "interrupted" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", 0), "a rate above 0"),
        (("--lengths", "missing"), "cannot be read"),
        (("--api-key-file", "missing"), "cannot be read"),
    ],
)
def test_errors_are_found_before_anything_is_sent(arguments: tuple[object, ...], message: str) -> None:
    assert message in str(phalanx("localhost:1", *arguments).exception)


def test_a_plot_without_matplotlib_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("phalanx.serve.bench.plot", "phalanx.launcher.trace_plot"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    result = phalanx("localhost:1", "--plot", tmp_path / "out.png")
    assert "pip install 'phalanx[plot]'" in str(result.exception)


def test_a_directory_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    result = phalanx("localhost:1", "--json", tmp_path / "missing" / "out.json")
    assert result.exit_code == 2
    assert "there is no directory" in result.stderr
