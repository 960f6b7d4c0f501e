"""Clients that send requests one behind the other over a connection, without waiting for the answers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from tests.serve.live import Live
from tests.serve.streams import Asked, bytes_of

from phalanx.serve.connection import MAX_PIPELINED

LONG = {"prompt": [5, 6, 7], "max_tokens": 240, "ignore_eos": True, "n": 4}


@contextmanager
def connection(server: Live) -> Iterator[socket.socket]:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as made:
        yield made


def request(**body: object) -> bytes:
    return bytes_of(Asked("/v1/completions", body))


def test_the_answers_come_in_the_order_of_the_requests(server: Live) -> None:
    with connection(server) as client, client.makefile("rb") as answers:
        client.sendall(b"".join(request(prompt="abc"[:length], max_tokens=1) for length in (3, 1, 2)))
        found = []
        for _ in range(3):
            lines = list(iter(answers.readline, b"\r\n"))
            [length] = [int(line.split()[1]) for line in lines if line.startswith(b"content-length:")]
            found.append(json.loads(answers.read(length))["usage"]["prompt_tokens"])
    assert found == [3, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_ends_what_runs_and_what_waits(server: Live, stream: bool) -> None:
    [before] = server.engine.replica_stats()
    with connection(server) as client:
        client.sendall(3 * request(**LONG, stream=stream))
        while server.engine.replica_stats()[0].running < 4:
            time.sleep(0.005)
    while server.front.service.num_open or server.engine.replica_stats()[0].pages_used:
        time.sleep(0.005)
    [after] = server.engine.replica_stats()
    assert (after.aborted - before.aborted, after.finished - before.finished) == (1, 0)
    assert after.requests - before.requests == 1


def test_a_connection_that_sends_too_far_ahead_is_cut_off(server: Live) -> None:
    with connection(server) as client:
        client.sendall((MAX_PIPELINED + 2) * request(**LONG))
        with suppress(ConnectionResetError):
            assert client.recv(1) == b""
