"""Processes of the pool forked from one that has imported torch: importing takes seconds, a fork milliseconds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]


class ForkedWorker:
    """A process of `rank_worker.py`, with of `subprocess.Popen` what the pool needs."""

    def __init__(self, pid: int, stdin: IO[str], stdout: IO[str]) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self._process: int | None = None
        with contextlib.suppress(ProcessLookupError):  # it has ended already
            self._process = os.pidfd_open(pid)

    def kill(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._process, signal.SIGKILL)

    def wait(self, timeout_s: float) -> None:
        """Raises TimeoutError where it does not end."""
        if self._process is None:
            return
        if not select.select([self._process], [], [], timeout_s)[0]:
            raise TimeoutError(f"a worker has not ended within {timeout_s:g} s")
        os.close(self._process)
        self._process = None


class Nursery:
    """The process that forks them; ends with its other end of the socket, and they with theirs of their pipes."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.comm.rank_nursery", str(theirs.fileno())],
                cwd=ROOT,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def start(self, rendezvous: str) -> ForkedWorker:
        commands, to_worker = os.pipe()
        from_worker, answers = os.pipe()
        socket.send_fds(self._socket, [rendezvous.encode()], [commands, answers])
        pid = int.from_bytes(self._socket.recv(8))
        for theirs in (commands, answers):
            os.close(theirs)
        assert pid, "the nursery of ranks has ended"
        return ForkedWorker(pid, os.fdopen(to_worker, "w", buffering=1), os.fdopen(from_worker))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def _serve(requests: socket.socket) -> None:
    from tests.comm.rank_worker import serve

    from phalanx.comm import hierarchical, shm_native  # noqa: F401 # what the workers will need

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ended leave nothing behind
    while True:
        rendezvous, pipes, _, _ = socket.recv_fds(requests, 1024, 2)
        if not rendezvous:
            return
        pid = os.fork()
        if not pid:
            requests.close()
            _become_worker(pipes, rendezvous.decode(), serve)
        for pipe in pipes:
            os.close(pipe)
        requests.sendall(pid.to_bytes(8))


def _become_worker(pipes: Sequence[int], rendezvous: str, serve: Callable[[str], None]) -> None:
    """Never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for number, pipe in enumerate(pipes):
            os.dup2(pipe, number)
            os.close(pipe)
        serve(rendezvous)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
