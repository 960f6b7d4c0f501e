"""Server-sent events (WHATWG HTML, section 9.2), as OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from phalanx.serve.errors import ApiError, ClientGoneError

SILENCE_S = 15.0  # proxies take a connection that says nothing for longer as dead
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"


def event(data: Any) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


class EventStream(Response):
    """Sends chunks as they come. The answer begins with the first of them, so that a request which is refused gets an
    error's status; one that waits long gets its headers and now and then a comment, lest proxies lose patience.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        refusal: Callable[[Exception], ApiError],
        *,
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
        )
        del self.headers["content-length"]  # of the empty body, which the base class puts in
        self._chunks = chunks
        self._refusal = refusal
        self._silence_s = silence_s
        self._started = False
        self._sent_s = time.monotonic()
        self._turn = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._comment: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._watch(send)
        try:
            async with aclosing(self._chunks):
                async for chunk in self._chunks:
                    async with self._turn:
                        await self._write(send, chunk)
        except ClientGoneError:
            raise
        except Exception as error:
            refusal = self._refusal(error)
            async with self._turn:
                if not self._started:
                    await refusal.response()(scope, receive, send)
                    return
                await self._write(send, event(refusal.body()))
        finally:
            if self._timer is not None:
                self._timer.cancel()
            if self._comment is not None:
                self._comment.cancel()
                await asyncio.wait((self._comment,))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send, data: bytes) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._sent_s = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    def _watch(self, send: Send) -> None:
        left_s = self._sent_s + self._silence_s - time.monotonic()
        if left_s <= 0 and not self._turn.locked():  # locked: a chunk is on its way, to a client that reads slowly
            self._comment = asyncio.create_task(self._fill(send))
            left_s = self._silence_s
        self._timer = asyncio.get_running_loop().call_later(max(0.01, left_s), self._watch, send)

    async def _fill(self, send: Send) -> None:
        async with self._turn:
            await self._write(send, COMMENT)
