"""NCCL on raw pointers, on streams and communicators of our own.

What is blocking runs on the caller's stream, what is asynchronous on a stream beside it (`nccl_line.py`); sends and
receives go through a communicator for each direction between two ranks (`nccl_pair.py`). `stream_ordered.py` says how
waits are bounded and timed.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Self, TypeVar

import torch
from torch._C._distributed_c10d import PrefixStore

from phalanx.comm.communicator import ReduceOp
from phalanx.comm.gpu import Gpu
from phalanx.comm.group import GroupSpec
from phalanx.comm.nccl_binding import DATA_TYPES, REDUCTIONS, NcclBinding, NcclComm
from phalanx.comm.nccl_line import Line, Operation
from phalanx.comm.nccl_pair import Pair
from phalanx.comm.stream_ordered import HostWait, StreamOrderedCommunicator, StreamWork
from phalanx.errors import CommError

Value = TypeVar("Value")

_ABORT_S = 0.6  # with what `StreamOrderedCommunicator` takes, within a second


class NcclCommunicator(StreamOrderedCommunicator):
    """Over NCCL, one GPU a rank. Sums are added in NCCL's order, in the dtype of the tensor.

    May be captured into a CUDA graph, on the current stream and after one call outside of it; a handle must be waited
    for in the same capture. Reset the graph before `close`: NCCL waits for the graphs that use a communicator.
    """

    backend = "nccl"
    capturable = True

    def __init__(self, spec: GroupSpec, binding: NcclBinding, gpu: Gpu, comm: NcclComm | None = None) -> None:
        """comm: NCCL's communicator of these ranks where there is one already, as after `split`."""
        super().__init__(spec, gpu)
        self._spec = spec
        self._binding = binding
        self._pairs: dict[tuple[int, int], Pair] = {}
        try:
            self._line = Line(gpu, comm or self._join())
        except (RuntimeError, CommError):
            self._board.close()
            raise
        self._flag = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._watch()

    def split(self, colors: Sequence[int], name: str) -> Self | None:
        """The communicator of this rank's part of the group; None where its color is below 0.

        Every rank calls this with the same arguments, when nothing is under way. colors: one a rank; ranks of the same
        color are a part, numbered in their order. name: of the parts, new in this group. NCCL makes them out of the
        connections that stand, without a rendezvous.
        """
        self._check_usable("split")
        if len(colors) != self.size:
            raise CommError(f"split of group {self.group!r}: colors must be {self.size} numbers, found {list(colors)}")
        if not self._settled():
            raise CommError(f"split of group {self.group!r}: operations are under way; wait for them first")
        color = colors[self.rank]
        comm = self._within(lambda: self._line.split(max(color, -1), self.rank), f"the split {name!r}")
        if comm is None:
            return None
        ranks = [rank for rank, other in enumerate(colors) if other == color]
        spec = replace(
            self._spec,
            rank=ranks.index(self.rank),
            size=len(ranks),
            name=name,
            store=None if self._store is None else PrefixStore(f"split/{name}/{color}", self._store),
        )
        return type(self)(spec, self._binding, self._gpu, comm)

    # ---- operations ----

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> StreamWork:
        at, count, dtype, reduction = x.data_ptr(), x.numel(), DATA_TYPES[x.dtype], REDUCTIONS[op]
        return self._enqueue(lambda comm, stream: comm.all_reduce(at, at, count, dtype, reduction, stream), x)

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> StreamWork:
        source, target, count, dtype = x.data_ptr(), output.data_ptr(), x.numel(), DATA_TYPES[x.dtype]
        if sizes is None:
            return self._enqueue(lambda comm, stream: comm.all_gather(source, target, count, dtype, stream), output, x)

        def gather(comm: NcclComm, stream: int, root: int, start: int, count: int) -> None:
            at = target + start * x.itemsize
            comm.broadcast(source if root == self.rank else at, at, count, dtype, root, stream)

        return self._enqueue(self._for_each_part(gather, sizes, x), output, x)

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> StreamWork:
        source, target, count, dtype = x.data_ptr(), output.data_ptr(), output.numel(), DATA_TYPES[x.dtype]
        add = REDUCTIONS["sum"]
        if sizes is None:
            return self._enqueue(
                lambda comm, stream: comm.reduce_scatter(source, target, count, dtype, add, stream), output, x
            )

        def scatter(comm: NcclComm, stream: int, root: int, start: int, count: int) -> None:
            at = source + start * x.itemsize
            # Only the root's target counts; x must stay as it is.
            comm.reduce(at, target if root == self.rank else 0, count, dtype, add, root, stream)

        return self._enqueue(self._for_each_part(scatter, sizes, x), output, x)

    def _start_broadcast(self, x: torch.Tensor, root: int) -> StreamWork:
        at, count, dtype = x.data_ptr(), x.numel(), DATA_TYPES[x.dtype]
        return self._enqueue(lambda comm, stream: comm.broadcast(at, at, count, dtype, root, stream), x)

    def _start_send(self, x: torch.Tensor, to: int) -> StreamWork:
        at, count, dtype = x.data_ptr(), x.numel(), DATA_TYPES[x.dtype]
        return self._pair(self.rank, to).start(
            lambda comm, stream: comm.send(at, count, dtype, 1, stream),
            x,
            in_order=self._in_order,
            capturing=self._capturing,
        )

    def _start_recv(self, x: torch.Tensor, source: int) -> StreamWork:
        at, count, dtype = x.data_ptr(), x.numel(), DATA_TYPES[x.dtype]
        return self._pair(source, self.rank).start(
            lambda comm, stream: comm.recv(at, count, dtype, 0, stream),
            x,
            in_order=self._in_order,
            capturing=self._capturing,
        )

    def _start_barrier(self) -> StreamWork:
        if self._capturing:
            raise CommError(f"barrier in group {self.group!r}: it blocks the thread and cannot be captured")
        self._in_order = False  # its event tells when it is done
        return HostWait(self._start_all_reduce(self._flag, "max").is_done, lambda: self._broken)

    def _enqueue(self, operation: Operation, *tensors: torch.Tensor) -> StreamWork:
        return self._line.enqueue(operation, tensors, in_order=self._in_order, capturing=self._capturing)

    def _for_each_part(
        self, part: Callable[[NcclComm, int, int, int, int], None], sizes: Sequence[int], x: torch.Tensor
    ) -> Operation:
        """One operation made of one a rank. part: given communicator, stream, rank, and its first element and count."""
        width = math.prod(x.shape[1:])
        starts = [0, *accumulate(sizes)]

        def run(comm: NcclComm, stream: int) -> None:
            self._binding.group_start()
            try:
                for root, rows in enumerate(sizes):
                    if rows:
                        part(comm, stream, root, starts[root] * width, rows * width)
            finally:
                self._binding.group_end()

        return run

    # ---- meeting ----

    def _join(self) -> NcclComm:
        """The group's communicator, once all ranks have come."""
        if self._store is None:
            return self._binding.join(1, self._binding.unique_id(), 0)
        unique_id = self._exchange_id("id", sender=self.rank == 0)
        return self._within(lambda: self._binding.join(self.size, unique_id, self.rank), "the group")

    def _pair(self, sender: int, receiver: int) -> Pair:
        if (sender, receiver) not in self._pairs:
            key = f"pair/{sender}-{receiver}"
            is_sender = self.rank == sender

            def join() -> NcclComm:
                unique_id = self._exchange_id(key, sender=is_sender, patient=True)
                return self._binding.join(2, unique_id, 0 if is_sender else 1)

            name = f"rank {sender} to rank {receiver} of group {self.group!r}"
            self._pairs[sender, receiver] = Pair(self._gpu, name, join, lambda: self._broken)
        return self._pairs[sender, receiver]

    def _exchange_id(self, key: str, *, sender: bool, patient: bool = False) -> bytes:
        """The unique id that rank 0 of a communicator makes. patient: waits until the group is given up.

        In a pair the sender waits for the receiver to have come, since nothing can end NCCL's own waiting for it.
        """
        assert self._store is not None
        if sender:
            self._store.set(key, self._binding.unique_id().hex())
        elif patient:
            self._store.set(f"{key}/come", "1")
        awaited = key if not sender else f"{key}/come" if patient else key
        deadline_s = time.monotonic() + self.timeout_s
        pause_s = 0.001
        while not self._store.check([awaited]):
            if self._stopped or (not patient and time.monotonic() > deadline_s):
                raise CommError(f"group {self.group!r}: the other rank did not come to {key}")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.05)
        return bytes.fromhex(self._store.get(key).decode())

    def _within(self, connect: Callable[[], Value], what: str) -> Value:
        """What `connect` returns, on a thread that is left alone where NCCL waits for longer than the limit."""
        found: list[Value] = []
        failures: list[Exception] = []

        def run() -> None:
            try:
                self._gpu.bind_thread()
                found.append(connect())
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=run, name="phalanx-nccl-connect", daemon=True)
        thread.start()
        thread.join(self.timeout_s)
        if found:
            return found[0]
        cause = f"{failures[0]}" if failures else f"no answer from the other ranks within {self.timeout_s:g} s"
        raise CommError(
            f"rank {self.rank} of group {self.group!r}: NCCL cannot connect {what} from {self.device}: {cause}. Each "
            "rank needs a GPU of its own and an interface that reaches the others (NCCL_SOCKET_IFNAME, now "
            f"{os.environ.get('NCCL_SOCKET_IFNAME', 'not set')}); NCCL_DEBUG=INFO tells more"
        ) from (failures[0] if failures else None)

    # ---- the end ----

    def _check_health(self) -> None:
        for connection in self._connections():
            connection.check()

    def _connections(self) -> list[Line | Pair]:
        return [self._line, *self._pairs.values()]

    def _abort_here(self) -> None:
        self._end_all(lambda connection: connection.abort(), _ABORT_S)

    def _close(self) -> None:
        super()._close()
        if self._broken is None:
            self._end_all(lambda connection: connection.destroy(), self.timeout_s)

    def _end_all(self, how: Callable[[Line | Pair], None], limit_s: float) -> None:
        """NCCL frees memory and may wait for ranks that are gone: on threads, which past the limit are left to it."""

        def end(connection: Line | Pair) -> None:
            self._gpu.bind_thread()
            how(connection)

        threads = [threading.Thread(target=end, args=(each,), daemon=True) for each in self._connections()]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + limit_s
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
