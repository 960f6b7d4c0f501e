"""The few things that a transfer needs of a GPU: streams, events, and a thread of ours that disturbs nobody.

A seam, so that the code on top of it runs in tests without a GPU. Streams and events are torch's own.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch

_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_HIGH = -1  # priority: a transfer that waits for free multiprocessors keeps other ranks waiting too


class Stream(Protocol):
    """A queue of the GPU's work; what `torch.cuda.Stream` is."""

    @property
    def cuda_stream(self) -> int:
        """The raw handle."""
        ...

    def wait_event(self, event: Any) -> None:
        """What is enqueued here from now on runs after what was on the event's stream when it was recorded."""
        ...


class Event(Protocol):
    """A mark in a stream; what `torch.cuda.Event` is."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool:
        """Whether the GPU has reached it. Never blocks."""
        ...

    def synchronize(self) -> None:
        """Blocks the thread until the GPU has reached it."""
        ...

    def elapsed_time(self, end: Any) -> float:
        """Milliseconds from this mark to `end`; both must be timed, and reached."""
        ...


class Gpu(Protocol):
    """One GPU, as transfers use it."""

    def current_stream(self) -> Stream: ...

    def new_stream(self) -> Stream: ...

    def new_event(self, *, timed: bool, sleeps: bool = False, external: bool = False) -> Event:
        """sleeps: a thread that synchronises with it leaves its core to others meanwhile. external: where it is
        recorded in a capture, every replay of the graph records it anew.
        """
        ...

    def is_capturing(self) -> bool:
        """Whether the current stream is being captured into a CUDA graph: nothing runs, nothing may be asked."""
        ...

    def bind_thread(self) -> None:
        """For a thread of our own, once: it works on this GPU, and what it asks breaks no capture of another thread."""
        ...

    def lend(self, tensor: torch.Tensor, stream: Stream) -> None:
        """The memory of `tensor`, once freed, is not given out again before `stream` has done what it has now to do."""
        ...

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Host memory that the GPU copies to and from by itself, as bytes."""
        ...

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Enqueues a copy on `stream`; host memory on either side must be pinned."""
        ...

    def named(self, name: str) -> AbstractContextManager[object]:
        """A range of this name in NVIDIA's profilers; nothing where none watches."""
        ...


class CudaGpu:
    """`Gpu` over torch. index: the number of the device in this process."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        # Nsight's tools hand their NVTX library to what they start in this variable; without one ranges are for nobody.
        self._watched = bool(os.environ.get("NVTX_INJECTION64_PATH"))

    def current_stream(self) -> Stream:
        return torch.cuda.current_stream(self.device)

    def new_stream(self) -> Stream:
        return cast(Stream, torch.cuda.Stream(self.device, priority=_HIGH))  # type: ignore[no-untyped-call]

    def new_event(self, *, timed: bool, sleeps: bool = False, external: bool = False) -> Event:
        return torch.cuda.Event(enable_timing=timed, blocking=sleeps, external=external)  # type: ignore[no-untyped-call]

    def is_capturing(self) -> bool:
        return bool(torch.cuda.is_current_stream_capturing())

    def bind_thread(self) -> None:
        torch.cuda.set_device(self.device)
        # By default a query on any thread ends a capture on another one with an error.
        mode = ctypes.c_int(_THREAD_LOCAL)
        ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def lend(self, tensor: torch.Tensor, stream: Stream) -> None:
        tensor.record_stream(cast(torch.cuda.Stream, stream))

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        with torch.cuda.stream(cast(torch.cuda.Stream, stream)):
            target.copy_(source, non_blocking=True)

    def named(self, name: str) -> AbstractContextManager[object]:
        return torch.cuda.nvtx.range(name) if self._watched else nullcontext()
