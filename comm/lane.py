"""Jobs that block, done one after another: by whoever waits for them, or by a thread behind its back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

import torch

from phalanx.comm.work import TimedWork

Job = Callable[[float], None]
"""Given the time by which it must be done, of the monotonic clock; raises LateError where it would pass that."""


class LateError(Exception):
    """A job that ran out of time."""


class Lane:
    """The order of the jobs, and the thread, which is started by the first job that nobody waits for."""

    def __init__(self, name: str, limit_s: float) -> None:
        """limit_s: for a job of the thread, from its start."""
        self._name = name
        self._limit_s = limit_s
        self._queue: SimpleQueue[_Queued | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: _Queued | None = None

    def add(self, job: Job, *, in_background: bool) -> _Now | _Queued:
        """The `Work` of a job. in_background: it goes on before it is waited for."""
        if not in_background and (self._last is None or self._last.done.is_set()):
            return _Now(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._last = _Queued(job)
        self._queue.put(self._last)
        return self._last

    def stop(self) -> None:
        """Ends the thread once it has done what it is at."""
        self._queue.put(None)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    # Results may be inference tensors, which can be written to in that mode only; it is a thread's own.
    @torch.inference_mode()
    def _run(self) -> None:
        while (queued := self._queue.get()) is not None:
            queued.run(time.monotonic() + self._limit_s)


class _Now:
    """A job for whoever waits for it."""

    __slots__ = ("_job",)

    def __init__(self, job: Job) -> None:
        self._job = job

    def wait(self, timeout_s: float) -> bool:
        try:
            self._job(time.monotonic() + timeout_s)
        except LateError:
            return False
        return True


class _Queued(TimedWork):
    """A job for the thread."""

    __slots__ = ("_error", "_job", "done")

    def __init__(self, job: Job) -> None:
        self._job = job
        self._error: Exception | None = None
        self.done = threading.Event()

    def run(self, deadline_s: float) -> None:
        began_s = time.perf_counter()
        try:
            self._job(deadline_s)
        except Exception as error:  # raised where it is waited for
            self._error = error
        finally:
            self.took_s = time.perf_counter() - began_s
            del self._job  # and with it the tensors, and whoever else could not be released while the thread lives
            self.done.set()

    def wait(self, timeout_s: float) -> bool:
        if not self.done.wait(timeout_s) or isinstance(self._error, LateError):
            return False
        if self._error is not None:
            raise self._error
        return True


def left_s(deadline_s: float) -> float:
    """Seconds until a time of the monotonic clock; never 0, which to some means without limit."""
    return max(0.001, deadline_s - time.monotonic())
