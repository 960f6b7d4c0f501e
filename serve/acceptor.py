"""Takes in connections a few at a time."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable

logger = logging.getLogger(__name__)

ACCEPTS = 16  # connections in a round of the event loop
PAUSE_S = 1.0  # after which another connection is tried where the system has no room for one
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Acceptor:
    """Serves the connections that come to a listening socket, as a server of asyncio does.

    uvloop's takes in all that wait at once, and reads all of them in the next round: hundreds of clients that come
    together would hold up those that are there. Here no round has more than `ACCEPTS` new ones to deal with.
    """

    def __init__(self, listening: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
        """protocol: makes that of a connection. The socket is listened at, and remains the caller's."""
        listening.setblocking(False)
        self._socket = listening
        self._protocol = protocol
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._serving = True
        self._resume()

    def close(self) -> None:
        """Takes in no more. Connections that are open stay so."""
        if self._serving:
            self._serving = False
            self._loop.remove_reader(self._socket)
            if self._pause is not None:
                self._pause.cancel()

    async def wait_closed(self) -> None:
        if self._opening:
            await asyncio.wait(self._opening)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in NO_ROOM:
                    raise
                logger.warning("no connection can be taken in now: %s; raise the limit of open files", error.strerror)
                self._loop.remove_reader(self._socket)
                self._pause = self._loop.call_later(PAUSE_S, self._resume)
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection)
        except OSError:  # the client has gone
            connection.close()
