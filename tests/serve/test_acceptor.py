"""Connections taken in a few at a time."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import uvloop

from phalanx.serve import acceptor
from phalanx.serve.acceptor import ACCEPTS, Acceptor

Runner = Callable[[Coroutine[Any, Any, None]], None]


@contextmanager
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=256) as found:
        yield found


class Answering(asyncio.Protocol):
    """Says in which round of the event loop it was made."""

    def __init__(self, rounds: list[int], made: list[int]) -> None:
        made.append(rounds[0])

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.write(b"here")
        transport.close()


@pytest.fixture(params=[asyncio.run, uvloop.run])
def run(request: pytest.FixtureRequest) -> Runner:
    chosen: Runner = request.param
    return chosen


def test_no_round_takes_in_more_than_a_few(run: Runner) -> None:
    rounds, made = [0], list[int]()

    async def serve(bound: socket.socket, clients: list[socket.socket]) -> None:
        loop = asyncio.get_running_loop()

        def count() -> None:
            rounds[0] += 1
            loop.call_soon(count)

        count()
        taking = Acceptor(bound, lambda: Answering(rounds, made))
        async with asyncio.timeout(20):
            for client in clients:
                client.setblocking(False)
                assert await loop.sock_recv(client, 16) == b"here"
        taking.close()
        await taking.wait_closed()

    with listening() as bound, ExitStack() as closing:
        address = bound.getsockname()
        clients = [closing.enter_context(socket.create_connection(address)) for _ in range(5 * ACCEPTS)]
        run(serve(bound, clients))
    assert len(made) == 5 * ACCEPTS
    assert max(made.count(each) for each in made) <= ACCEPTS


def test_where_the_system_has_no_room_it_is_tried_again(
    run: Runner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(acceptor, "PAUSE_S", 0.05)

    class Full(socket.socket):
        """Has no room at first."""

        refusals = 2

        def accept(self) -> tuple[socket.socket, Any]:
            if self.refusals:
                self.refusals -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def serve(bound: socket.socket, client: socket.socket) -> None:
        taking = Acceptor(bound, lambda: Answering([0], []))
        client.setblocking(False)
        async with asyncio.timeout(20):
            assert await asyncio.get_running_loop().sock_recv(client, 16) == b"here"
        taking.close()

    with (
        listening() as plain,
        Full(fileno=plain.detach()) as bound,
        socket.create_connection(bound.getsockname()) as client,
        caplog.at_level(logging.WARNING),
    ):
        run(serve(bound, client))
    assert caplog.text.count("limit of open files") == 2


def test_a_closed_one_takes_in_nothing(run: Runner) -> None:
    made: list[int] = []

    async def serve(bound: socket.socket) -> None:
        Acceptor(bound, lambda: Answering([0], made)).close()
        with socket.create_connection(bound.getsockname()):
            await asyncio.sleep(0.05)

    with listening() as bound:
        run(serve(bound))
    assert not made
