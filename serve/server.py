"""The server: one event loop in front of an engine, which finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from phalanx.errors import PhalanxError
from phalanx.launcher.config import Config
from phalanx.serve.app import HttpFront
from phalanx.serve.gate import ABORT

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the balancers in front keep a connection that is idle
LAST_WORDS_S = 5.0  # for answers that were cut short to be sent
MAX_PIPELINED = 16  # requests that may wait on one connection for the answer to another
LOOK_S = 0.05
BACKLOG = 2048  # connections that the system keeps until they are accepted
ACCEPTS = 16  # of them that are, in a round of the event loop
HEAD_TIMEOUT_S = 30.0  # for the headers of a request to come
MAX_HEAD_BYTES = 64 << 10
MAX_WAITING = 1024  # completions, for each replica


def bind(host: str, port: int) -> socket.socket:
    """A socket to serve at, before anything else is started. Raises PhalanxError where it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise PhalanxError(
            f"cannot listen at {host}:{port}: {error.strerror or error}; choose another address or port with --host, "
            "--port, or end the program that has it"
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """Where a socket is reached from this machine."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def with_bounds(config: Config) -> Config:
    """A configuration with a bound on what may wait: clients can send without end, programs know what they ask."""
    if config.engine.max_waiting is not None:
        return config
    return config.model_copy(update={"engine": config.engine.model_copy(update={"max_waiting": MAX_WAITING})})


class HttpServer(uvicorn.Server):
    """Serves a front until it is told to stop.

    The first SIGTERM or SIGINT makes it refuse new work and finish what runs, for at most `serve.drain_timeout_s`; then
    what is left ends with what there is of it. A second signal cuts that short.
    """

    def __init__(self, front: HttpFront, *, on_start: Callable[[], None] = lambda: None) -> None:
        """on_start: called once it can be reached."""
        super().__init__(
            uvicorn.Config(
                front.app,
                http=_Protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                backlog=ACCEPTS,
            )
        )
        self._front = front
        self._draining: asyncio.Task[None] | None = None
        self._hurried = False
        self._on_start = on_start
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for each in sockets or ():
            each.listen(BACKLOG)  # more than asyncio would accept at once
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:  # it has not begun yet
            self.should_exit = True
            return
        again = self._front.service.draining
        self._loop.call_soon_threadsafe(self.hurry if again else self.drain)

    def drain(self) -> None:
        """Begins to stop. From the event loop's thread."""
        service = self._front.service
        if service.draining:
            return
        service.draining = True
        logger.info("stopping: %d requests are being finished, new ones are refused", service.num_requests)
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    def hurry(self) -> None:
        """Stops as soon as what there is of each request is sent. From the event loop's thread."""
        self._hurried = True
        self.drain()

    async def _drain(self) -> None:
        service = self._front.service
        until_s = time.monotonic() + service.settings.drain_timeout_s
        while service.num_requests and time.monotonic() < until_s and not self._hurried:
            await asyncio.sleep(LOOK_S)
        until_s = time.monotonic() + LAST_WORDS_S
        while service.num_requests and time.monotonic() < until_s:
            service.abort_all()
            await asyncio.sleep(LOOK_S)
        self.should_exit = True
        self.config.timeout_graceful_shutdown = int(LAST_WORDS_S)


class _Protocol(HttpToolsProtocol):
    """Bounds what uvicorn leaves open, the head of a request, and lets the application cut a connection off."""

    _in_head = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_more()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._end_head()
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

    def _head_late(self) -> None:
        if self._is_idle:
            self.timeout_keep_alive_handler()
        else:  # a request that came before this one is still being answered
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_late)
