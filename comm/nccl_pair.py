"""Sends from one rank to another: an NCCL communicator of the two alone, made when it is first used."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from phalanx.comm.gpu import Gpu
from phalanx.comm.nccl_binding import NcclComm
from phalanx.comm.nccl_line import Line, Operation
from phalanx.comm.stream_ordered import StreamWork
from phalanx.errors import CommError

_GLANCE_S = 0.05


class Pair:
    """One direction between two ranks.

    NCCL runs the operations of one communicator one after another. So each direction has its own: a receive that is
    posted ahead holds up neither what is sent meanwhile nor the group's collectives.

    The first use makes it. That needs both ranks and so happens on a thread: if it blocked the caller, ranks that send
    to each other in a ring would each wait for the next one to receive. What is started before it stands is enqueued by
    that thread; its `wait` blocks until then.
    """

    def __init__(self, gpu: Gpu, name: str, join: Callable[[], NcclComm], why_broken: Callable[[], str | None]) -> None:
        self._gpu = gpu
        self._name = name
        self._join = join
        self._why_broken = why_broken
        self._lock = threading.Lock()
        self._ended = threading.Event()  # standing, failed or aborted
        self._deferred: list[_Deferred] = []
        self._line: Line | None = None
        self._failure = ""
        threading.Thread(target=self._connect, name=f"phalanx-{name}", daemon=True).start()

    def start(self, operation: Operation, x: torch.Tensor, *, in_order: bool, capturing: bool) -> StreamWork:
        """Enqueues the operation, now or when the pair stands."""
        if self._line is None:
            if capturing:
                raise CommError(
                    f"{self._name}: its first transfer cannot be captured into a CUDA graph, because it connects the "
                    "two ranks; make one before the capture"
                )
            with self._lock:
                if self._line is None:
                    work = _Deferred(self, self._gpu, operation, x)
                    self._deferred.append(work)
                    return work
        return self._line.enqueue(operation, (x,), in_order=in_order, capturing=capturing)

    def check(self) -> None:
        if self._failure:
            raise RuntimeError(self._failure)
        if self._line is not None:
            self._line.check()

    def abort(self) -> None:
        self._end(Line.abort)

    def destroy(self) -> None:
        self._end(Line.destroy)

    def _end(self, how: Callable[[Line], None]) -> None:
        with self._lock:
            line = self._line
            self._failure = self._failure or f"{self._name} has been closed"
        self._ended.set()
        if line is not None:
            how(line)

    def _connect(self) -> None:
        self._gpu.bind_thread()
        try:
            line = Line(self._gpu, self._join())
        except (RuntimeError, CommError) as error:
            self._failure = str(error)
            self._ended.set()
            return
        with self._lock:
            if self._failure:  # aborted meanwhile
                line.abort()
                return
            # Before any later one: the order of the calls is the order in which they match.
            for work in self._deferred:
                try:
                    work.enqueue(line)
                except RuntimeError as error:
                    self._failure = str(error)
                    break
            self._deferred.clear()
            self._line = line
        self._ended.set()

    def wait_until_enqueued(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        while not self._ended.wait(_GLANCE_S):
            why = self._why_broken()
            if why is not None:
                raise RuntimeError(why)
            if time.monotonic() > deadline_s:
                return False
        if self._failure:
            raise RuntimeError(self._failure)
        return True


class _Deferred:
    """A transfer that was started before its pair stood. It runs on the pair's stream."""

    def __init__(self, pair: Pair, gpu: Gpu, operation: Operation, x: torch.Tensor) -> None:
        self._pair = pair
        self._operation = operation
        self._x = x
        self._caller = gpu.current_stream()
        self._ready = gpu.new_event(timed=False)
        self._ready.record(self._caller)
        self._work: StreamWork | None = None

    def enqueue(self, line: Line) -> None:
        """On the pair's thread."""
        self._work = line.enqueue_behind(self._ready, self._caller, self._operation, (self._x,))

    def is_done(self) -> bool:
        return self._work is not None and self._work.is_done()

    def wait(self, timeout_s: float) -> bool:
        if not self._pair.wait_until_enqueued(timeout_s):
            return False
        assert self._work is not None
        return self._work.wait(timeout_s)
