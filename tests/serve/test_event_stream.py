"""Server-sent events: what is sent while nothing comes, and how a stream ends that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable

import pytest
from starlette.types import Message

from phalanx.serve.errors import ApiError
from phalanx.serve.event_stream import COMMENT, EventStream

SCOPE = {"type": "http", "method": "POST", "path": "/"}


class Client:
    """Takes what is sent. takes_s: for each message."""

    def __init__(self, takes_s: float = 0.0) -> None:
        self.takes_s = takes_s
        self.status: int | None = None
        self.parts: list[bytes] = []
        self.sending = 0

    async def send(self, message: Message) -> None:
        self.sending += 1
        assert self.sending == 1, "two messages at once"
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.parts.append(message["body"])
        await asyncio.sleep(self.takes_s)
        self.sending -= 1

    async def receive(self) -> Message:
        raise NotImplementedError


def sent(client: Client, chunks: Callable[[], AsyncGenerator[bytes, None]], silence_s: float) -> list[bytes]:
    async def send() -> None:
        stream = EventStream(chunks(), lambda error: ApiError(418, str(error)), silence_s=silence_s)
        async with asyncio.timeout(20):
            await stream(SCOPE, client.receive, client.send)
        assert len(asyncio.all_tasks()) == 1, "something goes on"

    asyncio.run(send())
    return client.parts


def test_a_silent_stream_begins_and_says_now_and_then_that_it_lives() -> None:
    client = Client()

    async def chunks() -> AsyncGenerator[bytes, None]:
        for place in range(2):
            while client.parts.count(COMMENT) < 2 * (place + 1):
                await asyncio.sleep(0.005)
            yield b"chunk %d" % place

    parts = sent(client, chunks, 0.02)
    assert client.status == 200
    assert parts[:2] == [COMMENT, COMMENT]
    assert [part for part in parts if part != COMMENT] == [b"chunk 0", b"chunk 1", b""]


def test_a_lively_stream_says_nothing_else() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(3):
            await asyncio.sleep(0)
            yield b"chunk"

    assert sent(Client(), chunks, 15.0) == [b"chunk"] * 3 + [b""]


def test_what_a_slow_client_is_being_sent_is_not_broken_into() -> None:
    async def chunks() -> AsyncGenerator[bytes, None]:
        for _ in range(2):
            yield b"chunk"

    assert sent(Client(takes_s=0.1), chunks, 0.02)[:1] == [b"chunk"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_failure_is_an_answer_of_its_own_or_the_last_event(begun: bool) -> None:
    client = Client()

    async def chunks() -> AsyncGenerator[bytes, None]:
        if begun:
            yield b"chunk"
        raise RuntimeError("it broke")

    parts = sent(client, chunks, 15.0)
    assert client.status == (200 if begun else 418)
    last = parts[-2] if begun else parts[-1]
    assert b"it broke" in last
    assert last.startswith(b"data: ") == begun
