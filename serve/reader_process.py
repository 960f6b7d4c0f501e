"""A process that reads large requests, so that the event loop and its interpreter stay free for small ones.

A body of a megabyte takes up to a second to read, most of it with the interpreter's lock held: in a thread it would
keep every stream waiting.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, TypeVar

from phalanx.serve.errors import ApiError, as_api_error
from phalanx.serve.request_reader import Read, RequestReader

T = TypeVar("T")

NICENESS = 5  # a large request waits rather than all the others


class _Refused(NamedTuple):
    """An ApiError on its way between processes."""

    status: int
    message: str
    param: str | None
    code: str | None


class ReaderProcess:
    """Reads as a `RequestReader` does, in a process that starts with the first request, or with `start`. It ends with
    `close`, or with the process we are in; where something else ends it, the next request starts another.
    """

    def __init__(self, reader: RequestReader) -> None:
        self._reader = reader
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._lock = threading.Lock()

    def read(self, method: Read[T], body: bytes) -> T:
        """What a method of the reader makes of a body. Blocks; one is read after the other. Raises ApiError."""
        with self._lock:
            try:
                answer = self._ask(method, body)
            except (OSError, EOFError):  # somebody ended the process just now, or it was too much for it
                self._end()
                try:
                    answer = self._ask(method, body)
                except (OSError, EOFError):
                    self._end()
                    raise ApiError(
                        503,
                        "the process that reads large requests ended while it read this one; send a smaller one, or "
                        "give the server more memory",
                        code="reader_failed",
                    ) from None
        if isinstance(answer, _Refused):
            raise ApiError(answer.status, answer.message, param=answer.param, code=answer.code)
        found: T = answer
        return found

    @property
    def pid(self) -> int | None:
        """Of the process, where it runs."""
        process = self._process
        return None if process is None else process.pid

    def start(self) -> None:
        """Starts the process, where it is not running, and finds out what the reader is to know."""
        _ = self._reader.max_prompt_bytes
        with self._lock:
            self._running()

    def close(self) -> None:
        """Ends the process, whatever it is at."""
        process = self._process
        if process is not None:
            process.kill()
        with self._lock:
            self._end()

    def _ask(self, method: Read[Any], body: bytes) -> Any:
        connection = self._running()
        connection.send((method, body))
        return connection.recv()

    def _running(self) -> Connection:
        if self._connection is None:
            ours, theirs = Pipe()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-c", f"from {__name__} import main; main({theirs.fileno()})"],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,  # an interrupt at the terminal is not for it
                )
            self._connection = ours
            ours.send(self._reader)
        return self._connection

    def _end(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def main(descriptor: int) -> None:
    """Serves a connection: a reader comes first, then methods and bodies, until its other end closes."""
    os.nice(NICENESS)
    with Connection(descriptor) as connection, contextlib.suppress(EOFError, ConnectionError):
        reader = connection.recv()
        while True:
            method, body = connection.recv()
            connection.send(_read(reader, method, body))


def _read(reader: RequestReader, method: Read[Any], body: bytes) -> Any:
    try:
        return method(reader, body)
    except Exception as error:
        told = as_api_error(error, retry_after_s=1.0)
    return _Refused(told.status, told.message, told.param, told.code)
