"""`BookedGraphs`: graphs whose memory is accounted for."""

from __future__ import annotations

from collections.abc import Callable

from phalanx.engine.memory_book import MemoryBook
from phalanx.kernels import Graph, Graphs


class BookedGraphs:
    """`Graphs` that write into a book what each capture takes."""

    def __init__(self, graphs: Graphs, book: MemoryBook) -> None:
        self._graphs = graphs
        self._book = book

    def capture(self, run: Callable[[], None]) -> Graph:
        with self._book.capturing():
            return self._graphs.capture(run)

    def reset(self) -> None:
        self._graphs.reset()
        self._book.forget_graphs()
