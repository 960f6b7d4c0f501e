"""A connection of a client: what uvicorn's is, and bounds on what that leaves open."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from phalanx.serve.exchange import Exchange
from phalanx.serve.gate import ABORT

MAX_PIPELINED = 16  # requests that may wait on one connection for the answer to another
HEAD_TIMEOUT_S = 30.0  # for the headers of a request to come
MAX_HEAD_BYTES = 64 << 10


class Connection(HttpToolsProtocol):
    """Bounds what uvicorn leaves open, the head of a request and how long a client may read nothing of an answer, and
    lets the application cut a connection off.
    """

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def __init__(self, *arguments: Any, stalled_client_s: float, **options: Any) -> None:
        """stalled_client_s: after which a client that does not read what is sent is cut off. The rest is uvicorn's."""
        super().__init__(*arguments, **options)
        self._stalled_client_s = stalled_client_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_head()
        self._end_stall()
        # uvicorn tells only the request that came last, which may be one that waits behind it.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            return
        if not self._in_head:
            if self._is_idle and self.timeout_keep_alive_task is None:  # empty lines are no request
                self._await_more()
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The headers are larger than {MAX_HEAD_BYTES} bytes, the most that is taken.")
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        extensions: dict[str, Any] = {ABORT: self.transport.abort}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        elif self.pipeline:  # uvicorn would read no more now, and not notice that the client goes
            self.flow.resume_reading()
        if self.parser.should_upgrade():  # there is nothing to change to, and the parser reads no further
            self.cycle.keep_alive = False

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self._stalled_client_s, self._stalled)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_stall()

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_more(self) -> None:
        """Closes the connection if it brings nothing, as uvicorn does where it brings nothing more."""
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _end_head(self) -> None:
        self._in_head, self._head_bytes = False, 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_stall(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _stalled(self) -> None:
        exchange = self._running and self._running.scope["state"].get("exchange")
        if isinstance(exchange, Exchange):
            exchange.refusal = "stalled"
        self.transport.abort()

    def _head_late(self) -> None:
        if self._is_idle:
            self.timeout_keep_alive_handler()
        else:  # a request that came before this one is still being answered
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)
