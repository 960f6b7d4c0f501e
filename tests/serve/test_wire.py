"""Whatever bytes come over a connection: an answer, a refusal or an end, and the server goes on."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.fuzzing import Fuzzed, fuzzed_server, tries

from phalanx.serve import connection as http_connection

BODY = b'{"prompt": [5], "max_tokens": 1}'
GET = b"GET /version HTTP/1.1"
POST = b"POST /v1/completions HTTP/1.1"
KEY = b"authorization: Bearer fuzz\r\n"
STATUS = re.compile(rb"HTTP/1.1 (\d\d\d) ")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    with fuzzed_server(tmp_path_factory.mktemp("wired")) as fuzzed:
        yield fuzzed


def request(line: bytes, *headers: bytes, body: bytes = b"", length: bool = True, close: bool = True) -> bytes:
    heads = [line, b"host: x", *headers]
    if length:
        heads.append(b"content-length: %d" % len(body))
    if close:
        heads.append(b"connection: close")
    return b"\r\n".join(heads) + b"\r\n" + KEY + b"\r\n" + body


def statuses(fuzzed: Fuzzed, data: bytes) -> list[int]:
    """Those of all answers to bytes, which must be well-formed, and the last of which must end the connection."""
    left, found = fuzzed.raw(data), []
    while left:
        head, _, left = left.partition(b"\r\n\r\n")
        match = STATUS.match(head)
        assert match, head[:200]
        status = int(match[1])
        found.append(status)
        length = re.search(rb"\r\ncontent-length: (\d+)", head)
        if status == 100:
            continue
        assert length, head
        body, left = left[: int(length[1])], left[int(length[1]) :]
        if b"content-type: application/json" in head and body:
            fuzzed.check(status, "application/json", body.decode())
        assert status < 500
    return found


HEADERS = ["accept", "authorization", "baggage", "content-encoding", "content-type", "cookie", "expect", "host"]
HEADERS += ["if-none-match", "origin", "range", "te", "traceparent", "tracestate", "user-agent", "x-forwarded-for"]
HEADERS += ["x-request-id"]


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("path", ["/v1/completions", "/metrics", "/"])
def test_any_header_is_answered(fuzzed: Fuzzed, header: str, path: str) -> None:
    @tries(3)
    @given(st.binary(max_size=40) | st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode))
    def answers(value: bytes) -> None:
        line = f"{'POST' if path.startswith('/v1') else 'GET'} {path} HTTP/1.1".encode()
        found = statuses(fuzzed, request(line, header.encode() + b": " + value.replace(b"\n", b""), body=BODY))
        assert found[-1] in (200, 400, 401)

    answers()


WORDS = [b"GET ", b"POST ", b"/version", b"/v1/completions", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"host: x", KEY]
WORDS += [b"content-length: 5", b"transfer-encoding: chunked", b"expect: 100-continue", b"connection: close", BODY]
WORDS += [b"5\r\nhello\r\n", b"0\r\n\r\n", b"upgrade: h2c", b"connection: upgrade", b"\0", b"\xff"]


@tries(60)
@given(st.lists(st.sampled_from(WORDS) | st.binary(max_size=8)))
def test_any_bytes_leave_the_server_as_it_was(fuzzed: Fuzzed, parts: list[bytes]) -> None:
    host, port = fuzzed.server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(b"".join(parts))
    answer = fuzzed.http.get("/version")
    fuzzed.check(answer.status_code, "application/json", answer.text)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (request(GET), [200]),
        (request(b"GET /version HTTP/1.0"), [200]),
        (request(b"GET /version HTTP/3.7"), [400]),
        (request(b"PRI * HTTP/2.0"), [400]),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), [400]),  # TLS
        (request(POST, b"x-request-id: a\x01b", body=BODY), [400]),
        (request(POST, b"x-request-id: a\r\n b", body=BODY), [400]),
        (request(POST, b"content-encoding: gzip", body=b"\x1f\x8b" + bytes(30)), [400]),
        (request(POST, b"content-type: text/plain", body=BODY), [200]),
        (request(POST, b"expect: 100-continue", body=BODY), [100, 200]),
        (request(POST, b"content-length: -5", length=False), [400]),
        (request(POST, b"content-length: 5", b"content-length: 6", length=False), [400]),
        (request(POST, b"content-length: 99999999999999999999999", length=False), [400]),
        (request(POST, b"content-length: 9999999999", length=False), [413]),
        (request(POST, b"content-length: 5", length=False), [408]),
        (request(POST, b"content-length: 5", b"transfer-encoding: chunked", length=False), [400]),
        (request(POST, b"transfer-encoding: chunked", length=False, body=b"20\r\n" + BODY + b"\r\n0\r\n\r\n"), [200]),
        (request(POST, b"transfer-encoding: chunked", length=False, body=b"1\r\n{\r\n" * 9 + b"0\r\n\r\n"), [400]),
        (request(POST, b"transfer-encoding: chunked", length=False, body=b"zz\r\n"), [400]),
        (request(POST, b"transfer-encoding: chunked", length=False, body=b"20\r\n"), [408]),
        (request(POST, b"upgrade: h2c", b"connection: upgrade", body=BODY, close=False), [400]),
        (request(POST, b"upgrade: h2c", body=BODY), [200]),
        (request(GET, b"upgrade: websocket", b"connection: upgrade", close=False) + request(GET), [200]),
        (request(POST, body=BODY, close=False) * 3 + request(GET), [200] * 4),
        (request(POST, body=b"{", close=False) + request(POST, body=BODY), [400, 200]),
        (request(GET, close=False) + b"junk\r\n\r\n", [400]),
        (request(GET, *[b"a: b"] * 1000), [200]),
    ],
    ids=lambda value: repr(value[:90]) if isinstance(value, bytes) else None,
)
def test_odd_bytes_are_answered(fuzzed: Fuzzed, data: bytes, expected: list[int]) -> None:
    assert statuses(fuzzed, data)[-len(expected) :] == expected
    fuzzed.goes_on()


@pytest.mark.parametrize("headers", [[b"a: " + b"b" * (8 << 20)], [b"a: b"] * (1 << 20)], ids=["long", "many"])
def test_headers_without_end_are_cut_off(fuzzed: Fuzzed, headers: list[bytes]) -> None:
    found = statuses(fuzzed, request(GET, *headers))
    assert found in ([], [400])  # a client that still sends may not be able to read why


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        *((method, "/v1/completions", 405) for method in ("GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE")),
        *((method, "/version", 405) for method in ("POST", "HEAD", "OPTIONS", "PROPFIND")),
        ("CONNECT", "/v1/completions", 405),
        ("BREW", "/v1/completions", 400),
        ("post", "/v1/completions", 400),
        *(
            ("POST", path, 404)
            for path in ("//v1/completions", "/v1/completions/", "/v1/../v1/completions", "/v1/%2e%2e/v1/completions",
                         "/V1/completions", "/v1/completions%00", "/%ff", "/%0d%0ax:y", "*", "/page/../status")
        ),
        ("GET", "/page/%2e%2e/server.py", 404),
        ("GET", "/page//etc/passwd", 404),
        ("POST", "/v1/completions?x=%ff&y", 200),
        ("POST", "/v1%2fcompletions", 200),
        ("POST", "http://elsewhere/v1/completions", 200),
        ("POST", "/" + "a" * 60000, 404),
        ("POST", "/" + "a" * 200000, 400),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_odd_methods_and_paths_are_answered(fuzzed: Fuzzed, method: str, path: str, expected: int) -> None:
    data = request(f"{method} {path} HTTP/1.1".encode(), body=BODY)
    found = fuzzed.raw(data)
    match = STATUS.match(found)
    assert match, found[:200]
    assert int(match[1]) == expected
    if expected in (404, 405) and method != "HEAD":
        fuzzed.check(expected, "application/json", found.partition(b"\r\n\r\n")[2].decode())


def test_a_change_of_protocol_is_refused_in_so_many_words(fuzzed: Fuzzed) -> None:
    found = fuzzed.raw(request(POST, b"upgrade: h2c", b"connection: upgrade", body=BODY, close=False))
    assert found.startswith(b"HTTP/1.1 400")
    assert b"without the header Upgrade" in found


@pytest.mark.parametrize(
    "key", [b"", b"Bearer", b"Bearer ", b"Bearer \xff", b"Basic fuzz", b"fuzz", b"Bearer fuzz fuzz"]
)
def test_no_odd_key_opens_the_door(fuzzed: Fuzzed, key: bytes) -> None:
    found = fuzzed.raw(b"GET /status HTTP/1.1\r\nconnection: close\r\nauthorization: " + key + b"\r\n\r\n")
    assert found.startswith(b"HTTP/1.1 401")


@pytest.mark.parametrize("data", [b"", b"\r\n\r\n", b"GET /version", b"GET /version HTTP/1.1\r\na: b\r\nc"])
def test_a_head_that_does_not_come_is_not_waited_for(
    fuzzed: Fuzzed, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(http_connection, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(fuzzed.server.server.config, "timeout_keep_alive", 0.2)
    assert fuzzed.raw(data) == b""
    assert fuzzed.raw(request(GET, close=False) + data).startswith(b"HTTP/1.1 200")


def test_a_slow_head_does_not_cut_off_the_answer_before_it(fuzzed: Fuzzed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_connection, "HEAD_TIMEOUT_S", 0.001)
    body = json.dumps({"prompt": [5], "max_tokens": 60, "ignore_eos": True}).encode()
    found = fuzzed.raw(request(POST, body=body, close=False) + b"GET /version")
    assert b'"finish_reason":"length"' in found
