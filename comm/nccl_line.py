"""One NCCL communicator and the stream of its own on which its transfers run beside compute."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch

from phalanx.comm.gpu import Event, Gpu, Stream
from phalanx.comm.nccl_binding import NcclComm
from phalanx.comm.stream_ordered import StreamWork

# A call that is stuck inside NCCL, connecting to a rank that is gone, is ended by the abort itself.
_POLITE_S = 0.2

Operation = Callable[[NcclComm, int], None]
"""Enqueues on a communicator, given the raw handle of a stream."""


class Line:
    """Enqueues operations; those of one line run one after another, in the order of the calls.

    blocking      caller's S  ──►── NCCL ──►             no event, no other stream: the shortest way
    asynchronous  caller's S  ──●ready ─ compute ─ wait(done)──►
                                 ╲                ╱
                  line's C        ╰──► NCCL ──●done
    """

    def __init__(self, gpu: Gpu, comm: NcclComm) -> None:
        self._gpu = gpu
        self._comm: NcclComm | None = comm
        self._stream = gpu.new_stream()
        self._last: Stream | None = None  # the stream of the operation before, outside of captures
        self._in_use = threading.Lock()

    def enqueue(
        self, operation: Operation, tensors: Sequence[torch.Tensor], *, in_order: bool, capturing: bool
    ) -> StreamWork:
        """in_order: on the caller's stream, which the operation blocks; else on the line's own.

        tensors: kept until the caller's stream has waited, so that their memory is not given out before.
        """
        current = self._gpu.current_stream()
        if in_order:
            self._call(operation, current, capturing)
            return _IN_ORDER
        ready = self._gpu.new_event(timed=False)
        ready.record(current)
        return self.enqueue_behind(ready, current, operation, tensors, capturing=capturing)

    def enqueue_behind(
        self,
        ready: Event,
        caller: Stream,
        operation: Operation,
        tensors: Sequence[torch.Tensor],
        *,
        capturing: bool = False,
    ) -> StreamWork:
        """On the line's own stream, after `ready`, an event of the stream `caller`."""
        self._stream.wait_event(ready)
        self._call(operation, self._stream, capturing)
        done = self._gpu.new_event(timed=False)
        done.record(self._stream)
        return _Transfer(self._gpu, caller, self._stream, done, tensors)

    def _call(self, operation: Operation, stream: Stream, capturing: bool) -> None:
        if not capturing and self._last is not None and self._last.cuda_stream != stream.cuda_stream:
            # All ranks must run a communicator's operations in the same order, whichever streams they are on.
            event = self._gpu.new_event(timed=False)
            event.record(self._last)
            stream.wait_event(event)
        self._last = None if capturing else stream
        with self._in_use:
            if self._comm is None:
                raise RuntimeError("NCCL's communicator has been aborted")
            operation(self._comm, stream.cuda_stream)

    def split(self, color: int, key: int) -> NcclComm | None:
        with self._in_use:
            if self._comm is None:
                raise RuntimeError("NCCL's communicator has been aborted")
            return self._comm.split(color, key)

    def check(self) -> None:
        """Raises RuntimeError for an error that came up behind the calls."""
        if self._in_use.acquire(blocking=False):  # while a call is made, the call itself tells
            try:
                if self._comm is not None:
                    self._comm.check()
            finally:
                self._in_use.release()

    def abort(self) -> None:
        self._release(lambda comm: comm.abort())

    def destroy(self) -> None:
        self._release(lambda comm: comm.destroy())

    def _release(self, how: Callable[[NcclComm], None]) -> None:
        polite = self._in_use.acquire(timeout=_POLITE_S)
        try:
            comm, self._comm = self._comm, None
            if comm is not None:
                how(comm)
        finally:
            if polite:
                self._in_use.release()


class _InOrder:
    """On the caller's own stream: what follows there comes after it."""

    __slots__ = ()

    def is_done(self) -> bool:
        return False  # not known here: the marks around it tell

    def wait(self, timeout_s: float) -> bool:
        return True


_IN_ORDER = _InOrder()


class _Transfer:
    """On a stream of its own. `tensors` are kept until the stream that uses them has been made to wait."""

    __slots__ = ("_caller", "_gpu", "_stream", "_tensors", "done")

    def __init__(self, gpu: Gpu, caller: Stream, stream: Stream, done: Event, tensors: Sequence[torch.Tensor]) -> None:
        self._gpu = gpu
        self._caller = caller
        self._stream = stream
        self._tensors = tensors
        self.done = done

    def is_done(self) -> bool:
        return self.done.query()

    def wait(self, timeout_s: float) -> bool:
        current = self._gpu.current_stream()
        current.wait_event(self.done)
        if current.cuda_stream != self._caller.cuda_stream:
            # The memory belongs to the caller's stream, which has not waited.
            for tensor in self._tensors:
                self._gpu.lend(tensor, self._stream)
        self._tensors = ()
        return True
