"""The server: one event loop in front of an engine, which finishes what runs before it ends."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from phalanx.errors import PhalanxError
from phalanx.launcher.config import Config
from phalanx.serve.acceptor import Acceptor
from phalanx.serve.app import HttpFront
from phalanx.serve.connection import Connection

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 75  # longer than the balancers in front keep a connection that is idle
LAST_WORDS_S = 5.0  # for answers that were cut short to be sent
LOOK_S = 0.05
BACKLOG = 2048  # connections that the system keeps until they are accepted
IDLE_TICKS = 50  # of 0.1 s
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

    def __init__(
        self,
        front: HttpFront,
        *,
        on_start: Callable[[], object] = lambda: None,
        on_idle: Callable[[], object] = lambda: None,
    ) -> None:
        """on_start: called once it can be reached. on_idle: called now and then while there is nothing to do."""
        super().__init__(
            uvicorn.Config(
                front.app,
                loop="uvloop",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
            )
        )
        self._front = front
        self._draining: asyncio.Task[None] | None = None
        self._hurried = False
        self._on_start = on_start
        self._on_idle = on_idle
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup([])
        for each in sockets or ():
            each.listen(BACKLOG)
            self.servers.append(Acceptor(each, self._connection))  # type: ignore[arg-type]
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        if counter % IDLE_TICKS == 0 and not self._front.service.num_requests:
            self._on_idle()
        return await super().on_tick(counter)

    def _connection(self) -> Connection:
        return Connection(
            self.config,
            self.server_state,
            self.lifespan.state,
            stalled_client_s=self._front.service.settings.stalled_client_s,
        )

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
