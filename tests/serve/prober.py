"""Asks a server for /health at fixed times, and notes how long each answer takes. Needs nothing but Python.

    python tests/serve/prober.py URL...

asks each URL until its standard input ends, and prints what came of it as JSON. The URL `bare` stands for a server of
nothing but a fixed answer, in a process of its own, which shows what the machine itself takes.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from urllib.parse import urlsplit

EVERY_S = 0.05
TIMEOUT_S = 30.0
BARE = "bare"


@dataclass
class Probes:
    """latencies_s: of each answer; what fell due while another answer was waited for counts as if it had been asked.
    at_s: when each was due, since the start. lags_s: how late this process woke up to ask.
    """

    url: str
    keeps: bool
    latencies_s: list[float] = field(default_factory=list)
    lags_s: list[float] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Prober:
    """Asks from a thread. keeps: whether over one connection, or a fresh one each time."""

    def __init__(self, url: str, *, keeps: bool, path: str = "/health", every_s: float = EVERY_S) -> None:
        self.probes = Probes(url, keeps)
        self._address = urlsplit(url)
        self._path = path
        self._every_s = every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prober", daemon=True)
        self._thread.start()

    def stop(self) -> Probes:
        self._ended.set()
        self._thread.join(TIMEOUT_S)
        return self.probes

    def _run(self) -> None:
        probes, began_s = self.probes, time.perf_counter()
        connection = self._connection()
        due_s = began_s
        while not self._ended.is_set():
            while (left_s := due_s - time.perf_counter()) > 0:
                time.sleep(left_s)
            from_s = time.perf_counter()
            try:
                connection.request("GET", self._path)
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    probes.problems.append(f"HTTP {response.status}")
            except (OSError, http.client.HTTPException) as error:
                probes.problems.append(f"{type(error).__name__}: {error}")
                connection.close()
            took_s = time.perf_counter() - from_s
            probes.lags_s.append(from_s - due_s)
            while took_s > 0:  # those due meanwhile would have waited for what was left of it
                probes.latencies_s.append(took_s)
                probes.at_s.append(due_s - began_s)
                took_s -= self._every_s
                due_s += self._every_s
            if not probes.keeps:
                connection.close()
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self._address.hostname or "", self._address.port, timeout=TIMEOUT_S)


def serve_bare(pipe: Connection) -> None:
    """Answers whatever is asked at a port, which it tells."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def main() -> None:
    probers = []
    for url in sys.argv[1:]:
        if url == BARE:
            ours, theirs = multiprocessing.Pipe()
            multiprocessing.get_context("spawn").Process(target=serve_bare, args=[theirs], daemon=True).start()
            probers.append(Prober(f"http://127.0.0.1:{ours.recv()}", keeps=True))
        else:
            probers += [Prober(url, keeps=True), Prober(url, keeps=False)]
    sys.stdin.read()
    print(json.dumps([asdict(prober.stop()) for prober in probers]))


if __name__ == "__main__":
    main()
