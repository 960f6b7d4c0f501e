"""A GPU made of threads over host memory: streams that run behind their callers, events, and an NCCL between ranks.

It keeps the promises of CUDA and NCCL that the backend relies on, and no others: a stream runs in order and waits for
nothing but the events it is told to wait for; an operation of a communicator runs when every rank's stream has come to
it, in the order of each rank's calls.
"""

from __future__ import annotations

import ctypes
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count
from typing import Any

import torch

from phalanx.comm.nccl_binding import DATA_TYPES

_DTYPES = {code: dtype for dtype, code in DATA_TYPES.items()}
_handles = count(1)


class FakeStream:
    """Runs what is enqueued, in order, on a thread. captured: what a graph is to issue, while one is captured."""

    def __init__(self) -> None:
        self.captured: list[Callable[[], None]] | None = None
        self.cuda_stream = next(_handles)
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def enqueue(self, run: Callable[[], None]) -> None:
        self.issue(lambda: self._queue.put(run))

    def issue(self, action: Callable[[], None]) -> None:
        """Calls it, now or in every replay of the graph that is being captured."""
        if self.captured is None:
            action()
        else:
            self.captured.append(action)

    def wait_event(self, event: FakeEvent) -> None:
        def issue() -> None:
            mark = event.mark
            self._queue.put(lambda: _wait(mark.reached))

        self.issue(issue)

    @torch.inference_mode()  # a GPU writes to any tensor; a CPU to those of inference mode only in that mode
    def _work(self) -> None:
        while True:
            self._queue.get()()


class _Mark:
    def __init__(self) -> None:
        self.reached = threading.Event()
        self.at_s = 0.0

    def reach(self) -> None:
        self.at_s = time.perf_counter()
        self.reached.set()


class FakeEvent:
    def __init__(self, timed: bool, external: bool = False) -> None:
        self.timed = timed
        self.external = external
        self.in_graph = False  # recorded in a capture last
        self.mark = _Mark()
        self.mark.reach()  # as with CUDA: an event that was never recorded holds up nobody

    def record(self, stream: FakeStream) -> None:
        def issue() -> None:
            self.mark = mark = _Mark()
            stream._queue.put(mark.reach)

        self.in_graph = stream.captured is not None
        stream.issue(issue)

    def query(self) -> bool:
        if self.in_graph and not self.external:
            raise RuntimeError("an event within a graph cannot be asked for, unless it is external")
        return self.mark.reached.is_set()

    def synchronize(self) -> None:
        _wait(self.mark.reached)

    def elapsed_time(self, end: FakeEvent) -> float:
        if not (self.timed and end.timed and self.query() and end.query()):
            raise RuntimeError("both events must be timed, and reached")
        return (end.mark.at_s - self.mark.at_s) * 1e3


class FakeGraph:
    """issued: by each replay, in this order."""

    def __init__(self) -> None:
        self.issued: list[Callable[[], None]] = []
        self.num_replays = 0

    def replay(self) -> None:
        self.num_replays += 1
        for action in self.issued:
            action()


class FakeGpu:
    """`Gpu` and `Graphs` of one rank. capturing: what `is_capturing` says."""

    def __init__(self) -> None:
        self.compute = FakeStream()
        self.streams = {self.compute.cuda_stream: self.compute}
        self.capturing = False
        self.graphs: list[FakeGraph] = []
        self.lent: list[tuple[torch.Tensor, int]] = []
        self.names: list[str] = []
        self._local = threading.local()

    def current_stream(self) -> FakeStream:
        return getattr(self._local, "stream", self.compute)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before = self.current_stream()
        self._local.stream = stream
        try:
            yield
        finally:
            self._local.stream = before

    def run(self, work: Callable[[], object], takes_s: float = 0.0) -> None:
        """A kernel on the current stream."""

        def kernel() -> None:
            time.sleep(takes_s)
            work()

        self.current_stream().enqueue(kernel)

    def synchronize(self) -> None:
        for stream in list(self.streams.values()):
            event = FakeEvent(timed=False)
            event.record(stream)
            event.synchronize()

    def new_stream(self) -> FakeStream:
        stream = FakeStream()
        self.streams[stream.cuda_stream] = stream
        return stream

    def new_event(self, *, timed: bool, sleeps: bool = False, external: bool = False) -> FakeEvent:
        return FakeEvent(timed, external)

    def capture(self, run: Callable[[], None]) -> FakeGraph:
        """As `Graphs` does."""
        graph, self.capturing = FakeGraph(), True
        for stream in self.streams.values():
            stream.captured = graph.issued
        try:
            run()
        finally:
            self.capturing = False
            for stream in self.streams.values():
                stream.captured = None
        self.graphs.append(graph)
        return graph

    def reset(self) -> None:
        self.graphs.clear()

    def is_capturing(self) -> bool:
        return self.capturing

    def bind_thread(self) -> None:
        return

    def lend(self, tensor: torch.Tensor, stream: Any) -> None:
        self.lent.append((tensor, stream.cuda_stream))

    def pinned(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        stream.enqueue(lambda: target.copy_(source))

    def named(self, name: str) -> AbstractContextManager[object]:
        self.names.append(name)
        return nullcontext()


class _Meeting:
    """The ranks of one communicator; a slot for each of its operations."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.slots: dict[object, dict[int, Any]] = {}
        self.finished: set[object] = set()

    def come(self, slot: object, rank: int, what: Any, finish: Callable[[dict[int, Any]], None], stop: Any) -> None:
        """Returns when all ranks have come to this slot, and the last to come has called `finish`."""
        with self.changed:
            here = self.slots.setdefault(slot, {})
            here[rank] = what
            if len(here) == self.size:
                finish(here)
                self.finished.add(slot)
                self.changed.notify_all()
            while slot not in self.finished and not stop():
                self.changed.wait(0.01)


class FakeNccl:
    """`NcclBinding` of one rank; ranks share `world`. gpu: whose streams the handles name."""

    told = "NCCL of the tests"

    def __init__(self, world: dict[bytes, _Meeting], gpu: FakeGpu) -> None:
        self._world = world
        self._gpu = gpu
        self.comms: list[FakeComm] = []
        self.depth = 0

    def unique_id(self) -> bytes:
        return next(_handles).to_bytes(128, "big")

    def join(self, size: int, unique_id: bytes, rank: int) -> FakeComm:
        meeting = self._world.setdefault(unique_id, _Meeting(size))
        meeting.come("join", rank, None, lambda _: None, lambda: False)
        return self.make(meeting, rank)

    def make(self, meeting: _Meeting, rank: int) -> FakeComm:
        self.comms.append(FakeComm(self, meeting, rank))
        return self.comms[-1]

    def stream(self, handle: int) -> FakeStream:
        return self._gpu.streams[handle]

    def group_start(self) -> None:
        self.depth += 1

    def group_end(self) -> None:
        self.depth -= 1


class FakeComm:
    """used: (operation, handle of its stream) of each call."""

    def __init__(self, nccl: FakeNccl, meeting: _Meeting, rank: int) -> None:
        self._nccl = nccl
        self._meeting = meeting
        self._rank = rank
        self._seq = count()
        self._num_open = 0
        self.used: list[tuple[str, int]] = []
        self.ill = ""
        self.hangs = threading.Event()  # set: abort takes ten seconds
        self.aborted = False
        self.destroyed = False

    def all_reduce(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        def finish(ranks: dict[int, Any]) -> None:
            total = _combined([_memory(each[0], count, dtype) for each in ranks.values()], op)
            for _, to in ranks.values():
                _memory(to, count, dtype).copy_(total)

        self._enqueue("all_reduce", (source, target), (count, dtype, op), finish, stream)

    def reduce(self, source: int, target: int, count: int, dtype: int, op: int, root: int, stream: int) -> None:
        def finish(ranks: dict[int, Any]) -> None:
            total = _combined([_memory(each[0], count, dtype) for each in ranks.values()], op)
            _memory(ranks[root][1], count, dtype).copy_(total)

        self._enqueue("reduce", (source, target), (count, dtype, op, root), finish, stream)

    def all_gather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        def finish(ranks: dict[int, Any]) -> None:
            whole = torch.cat([_memory(ranks[rank][0], count, dtype) for rank in sorted(ranks)])
            for _, to in ranks.values():
                _memory(to, whole.numel(), dtype).copy_(whole)

        self._enqueue("all_gather", (source, target), (count, dtype), finish, stream)

    def reduce_scatter(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        def finish(ranks: dict[int, Any]) -> None:
            total = _combined([_memory(each[0], count * len(ranks), dtype) for each in ranks.values()], op)
            for rank, (_, to) in ranks.items():
                _memory(to, count, dtype).copy_(total[rank * count : (rank + 1) * count])

        self._enqueue("reduce_scatter", (source, target), (count, dtype, op), finish, stream)

    def broadcast(self, source: int, target: int, count: int, dtype: int, root: int, stream: int) -> None:
        def finish(ranks: dict[int, Any]) -> None:
            value = _memory(ranks[root][0], count, dtype).clone()
            for _, to in ranks.values():
                _memory(to, count, dtype).copy_(value)

        self._enqueue("broadcast", (source, target), (count, dtype, root), finish, stream)

    def send(self, source: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._enqueue("send_recv", (source, 0), (count, dtype), lambda ranks: _pass_on(ranks, count, dtype), stream)

    def recv(self, target: int, count: int, dtype: int, peer: int, stream: int) -> None:
        self._enqueue("send_recv", (0, target), (count, dtype), lambda ranks: _pass_on(ranks, count, dtype), stream)

    def split(self, color: int, key: int) -> FakeComm | None:
        asked: dict[int, tuple[int, int]] = {}
        made: dict[int, _Meeting] = {}

        def finish(ranks: dict[int, Any]) -> None:
            asked.update(ranks)
            for each in {color for color, _ in ranks.values()}:
                made[each] = _Meeting(sum(color == each for color, _ in ranks.values()))
            self._meeting.slots["split", seq] = dict.fromkeys(ranks, (dict(asked), made))

        seq = next(self._seq)
        self._meeting.come(("split", seq), self._rank, (color, key), finish, lambda: self.aborted)
        asked, made = self._meeting.slots["split", seq][self._rank]
        if color < 0:
            return None
        order = sorted((key, rank) for rank, (of, key) in asked.items() if of == color)
        return self._nccl.make(made[color], order.index((key, self._rank)))

    def check(self) -> None:
        if self.ill:
            raise RuntimeError(self.ill)

    def abort(self) -> None:
        if self.hangs.is_set():
            time.sleep(10)
        self.aborted = True

    def destroy(self) -> None:
        assert self._num_open == 0, "destroyed with operations under way"
        self.destroyed = True

    def _enqueue(
        self, name: str, memory: tuple[int, int], alike: object, finish: Callable[[dict[int, Any]], None], stream: int
    ) -> None:
        assert not self.aborted
        assert not self.destroyed
        self.used.append((name, stream))
        queue = self._nccl.stream(stream)

        def issue() -> None:
            slot = (next(self._seq), name, alike)  # unlike calls never meet: they hang, as with NCCL
            self._num_open += 1

            def kernel() -> None:
                self._meeting.come(slot, self._rank, memory, finish, lambda: self.aborted)
                self._num_open -= 1

            queue.enqueue(kernel)

        queue.issue(issue)


def _memory(address: int, count: int, dtype: int) -> torch.Tensor:
    num_bytes = count * _DTYPES[dtype].itemsize
    return torch.frombuffer((ctypes.c_char * num_bytes).from_address(address), dtype=_DTYPES[dtype])


def _combined(parts: list[torch.Tensor], op: int) -> torch.Tensor:
    stacked = torch.stack(parts)
    return stacked.sum(0, dtype=stacked.dtype) if op == 0 else stacked.amax(0)


def _pass_on(ranks: dict[int, Any], count: int, dtype: int) -> None:
    _memory(ranks[1][1], count, dtype).copy_(_memory(ranks[0][0], count, dtype))


def _wait(event: threading.Event) -> None:
    if not event.wait(30):
        raise TimeoutError("a stream waited for 30 s")
