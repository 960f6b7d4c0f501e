"""`CudaGraphs`: a GPU's work, captured once and launched again in one go, without the interpreter.

A seam, so that what captures runs in tests without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Graph(Protocol):
    """What was captured; `torch.cuda.CUDAGraph` is one."""

    def replay(self) -> None:
        """Enqueues it on the current stream: with the numbers that now lie where the capture read some."""
        ...


class Graphs(Protocol):
    """Those of one rank, of which one runs at a time: they share their memory."""

    def capture(self, run: Callable[[], None]) -> Graph:
        """What `run` enqueues, which is not done there. The same must have run before, outside of a capture. What it
        leaves is to lie in tensors made outside: the memory of all others belongs to the other graphs too.
        """
        ...

    def reset(self) -> None:
        """Lets go of all, which may not be replayed from then on."""
        ...


class CudaGraphs:
    """`Graphs` over torch, on the current device."""

    def __init__(self) -> None:
        self._captured: list[torch.cuda.CUDAGraph] = []
        self._stream: torch.cuda.Stream | None = None

    def capture(self, run: Callable[[], None]) -> Graph:
        if self._stream is None:  # PyTorch's own may belong to another device
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        graph = torch.cuda.CUDAGraph()
        pool = self._captured[0].pool() if self._captured else None
        # Watchdogs of communicators ask on threads of their own meanwhile, which is no error of this one.
        with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        self._captured.append(graph)
        return graph

    def reset(self) -> None:
        for graph in self._captured:
            graph.reset()
        self._captured.clear()
