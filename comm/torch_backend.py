"""Communicators over torch.distributed's process groups: gloo for any CPU, NCCL for one GPU a rank.

The process-group objects are made directly, never through torch's global default group, so that any number of groups
and formations live in one process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from phalanx.comm.combine import NARROW
from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.gpu import CudaGpu
from phalanx.comm.group import GroupSpec
from phalanx.comm.rendezvous import meet
from phalanx.comm.stream_ordered import HostWait, StreamOrderedCommunicator, StreamWork
from phalanx.comm.work import Work
from phalanx.errors import CommError

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
TAG = 0
PIECE_BYTES = 4 << 20  # of a tensor that is sent
LEAST_CONNECT_S = 1.0  # that ranks which have met have for telling each other their addresses
_ABORT_TAG = 1  # nothing is ever sent under it


class GlooCommunicator(Communicator):
    """Over TCP, for the CPU. Collectives take tensors of other devices too, through host memory, blocking: what
    `host_staged.py` builds on.

    Sums of bfloat16 and float16 travel and are added in float32, then are rounded once: gloo's own rounds after each
    addition (mean error of a sum over 4 ranks in bfloat16 1.6 times that of one rounding). All else travels as it is.
    Of a tensor that does not fit what the other rank sent, gloo ends the process.
    """

    backend = "gloo"

    in_background = True

    def __init__(self, spec: GroupSpec) -> None:
        store = _met(spec)
        super().__init__(spec)
        gloo: Any = dist.ProcessGroupGloo
        with _connecting(self, spec):
            options = gloo._Options()
            options._devices = [gloo.create_device(hostname=spec.address)]
            # For connecting; gloo waits five times as long for a connection that does not come.
            options._timeout = timedelta(seconds=max(LEAST_CONNECT_S, spec.timeout_s / 5))
            # Typed loosely: torch's stubs leave out the overloads that take a single tensor.
            self._process_group: Any = gloo(store, spec.rank, spec.size, options)
        # From now on gloo's own limit must not strike first: ours names the ranks that are missing.
        self._process_group._set_default_timeout(timedelta(seconds=2 * spec.timeout_s + 10))

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work:
        wire = self._on_wire(x, widen=op == "sum")
        work = self._process_group.allreduce(wire, _REDUCE[op])
        return _GlooWork(work, wire, None) if wire is x else _GlooWork(work, wire, lambda: x.copy_(wire))

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        if sizes is None:
            wire, gathered = self._on_wire(x), _host_like(output)
            work = self._process_group._allgather_base(gathered, wire)
            return _GlooWork(work, wire, None if gathered is output else lambda: output.copy_(gathered))
        # gloo gathers equal parts only: pad to the longest, and leave the padding out afterwards.
        longest = max(sizes)
        padded = x.new_empty((longest, *x.shape[1:]), device="cpu")
        padded[: x.shape[0]] = x
        gathered = x.new_empty((self.size, longest, *x.shape[1:]), device="cpu")
        work = self._process_group._allgather_base(gathered.view(-1), padded.view(-1))

        def unpad() -> None:
            for rank, part in enumerate(torch.split(output, list(sizes))):
                part.copy_(gathered[rank, : sizes[rank]])

        return _GlooWork(work, padded, unpad)

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        # gloo's own reduce-scatter is an all-reduce of a copy; this is the same, for parts of any size.
        wire = self._on_wire(x, widen=True)
        if wire is x:
            wire = x.clone()
        work = self._process_group.allreduce(wire, dist.ReduceOp.SUM)
        start = self.rank * output.shape[0] if sizes is None else sum(sizes[: self.rank])
        return _GlooWork(work, wire, lambda: output.copy_(wire[start : start + output.shape[0]]))

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        wire = self._on_wire(x)
        work = self._process_group.broadcast(wire, root)
        return _GlooWork(work, wire, None if wire is x else lambda: x.copy_(wire))

    def _start_send(self, x: torch.Tensor, to: int, tag: int = TAG) -> Work:
        return _all_of([self._send_piece(piece, to, tag) for piece in _pieces(x)])

    def _start_recv(self, x: torch.Tensor, source: int, tag: int = TAG) -> Work:
        return _all_of([self._recv_piece(piece, source, tag) for piece in _pieces(x)])

    def _send_piece(self, x: torch.Tensor, to: int, tag: int = TAG) -> Work:
        return _GlooWork(_begin(self._process_group.send, x, to, tag), x, None)

    def _recv_piece(self, x: torch.Tensor, source: int, tag: int = TAG) -> Work:
        return _GlooWork(_begin(self._process_group.recv, x, source, tag), x, None)

    def _start_barrier(self) -> Work:
        flag = torch.zeros(1, dtype=torch.uint8)
        return _GlooWork(self._process_group.allreduce(flag, dist.ReduceOp.SUM), flag, None)

    def _abort(self) -> None:
        # gloo has no abort of its own (ProcessGroupGloo.abort does nothing), but a receive that runs out of time closes
        # every connection of its group, which fails what is pending here and on the other ranks.
        try:
            self._process_group.recv([torch.empty(1)], (self.rank + 1) % self.size, _ABORT_TAG).wait(
                timedelta(milliseconds=1)
            )
        except RuntimeError:
            return

    def _close(self) -> None:
        del self._process_group

    @staticmethod
    def _on_wire(x: torch.Tensor, *, widen: bool = False) -> torch.Tensor:
        """`x` as gloo sends it: itself wherever it can be."""
        if x.is_cpu and not (widen and x.dtype in NARROW):
            return x
        return x.to("cpu", torch.float32 if widen and x.dtype in NARROW else x.dtype)


class TorchNcclCommunicator(StreamOrderedCommunicator):
    """Over torch.distributed's NCCL, one GPU a rank, on streams of torch's own: where CuPy is missing."""

    backend = "nccl-torch"

    def __init__(self, spec: GroupSpec) -> None:
        store = _met(spec)
        index = torch.device(spec.device).index
        index = torch.cuda.current_device() if index is None else index
        super().__init__(replace(spec, device=f"cuda:{index}"), CudaGpu(index))
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        # torch's own limit ends the process; ours ends the group, and names the ranks that are missing.
        options._timeout = timedelta(seconds=2 * spec.timeout_s + 10)
        with _connecting(self, spec):
            self._process_group: Any = nccl(store, spec.rank, spec.size, options)
        self._watch()

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> StreamWork:
        return _NcclWork(self._process_group.allreduce(x, _REDUCE[op]))

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> StreamWork:
        if sizes is None:
            return _NcclWork(self._process_group._allgather_base(output, x))
        return _NcclWork(self._process_group.allgather([list(torch.split(output, list(sizes)))], [x]))

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> StreamWork:
        if sizes is None:
            return _NcclWork(self._process_group._reduce_scatter_base(output, x))
        return _NcclWork(self._process_group.reduce_scatter([output], [list(torch.split(x, list(sizes)))]))

    def _start_broadcast(self, x: torch.Tensor, root: int) -> StreamWork:
        return _NcclWork(self._process_group.broadcast(x, root))

    def _start_send(self, x: torch.Tensor, to: int) -> StreamWork:
        return _NcclWork(self._process_group.send([x], to, TAG))

    def _start_recv(self, x: torch.Tensor, source: int) -> StreamWork:
        return _NcclWork(self._process_group.recv([x], source, TAG))

    def _start_barrier(self) -> StreamWork:
        flag = torch.zeros(1, device=self.device)
        work = self._process_group.allreduce(flag, dist.ReduceOp.SUM)
        return HostWait(work.is_completed, lambda: self._broken)

    def _check_health(self) -> None:
        """torch's own watchdog looks after errors."""

    def _abort_here(self) -> None:
        threading.Thread(target=self._process_group.abort, daemon=True).start()

    def _close(self) -> None:
        super()._close()
        if self._broken is None:
            self._process_group.shutdown()
        del self._process_group


def _met(spec: GroupSpec) -> Store:
    """The group's store, when all ranks have come to it."""
    if spec.store is None:
        raise CommError(f"group {spec.name!r}: a group of {spec.size} needs a store to meet on")
    meet(spec.store, spec.name, spec.rank, spec.size, spec.timeout_s)
    return spec.store


@contextmanager
def _connecting(communicator: Communicator, spec: GroupSpec) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        communicator._board.close()
        raise CommError(
            f"rank {spec.rank} of group {spec.name!r} cannot connect to the others from {spec.address or spec.device}: "
            f"{_reason(error)}; name the network interface that reaches them"
        ) from error


class _GlooWork:
    """wire: the tensor that gloo reads or writes, kept alive. then: what puts the result where it belongs."""

    __slots__ = ("_then", "_wire", "_work")

    def __init__(self, work: Any, wire: torch.Tensor, then: Callable[[], object] | None) -> None:
        self._work = work
        self._wire = wire
        self._then = then

    def wait(self, timeout_s: float) -> bool:
        try:
            self._work.wait(_limit(timeout_s))
        except RuntimeError as error:
            if "imed out" in _reason(error):
                return False
            _raise_lost(error)
            raise
        if self._then is not None:
            self._then()
        return True


class _AllOf:
    __slots__ = ("_works",)

    def __init__(self, works: Sequence[Work]) -> None:
        self._works = works

    def wait(self, timeout_s: float) -> bool:
        deadline_s = time.monotonic() + timeout_s
        return all(work.wait(max(0.001, deadline_s - time.monotonic())) for work in self._works)


def _all_of(works: Sequence[Work]) -> Work:
    return works[0] if len(works) == 1 else _AllOf(works)


def _pieces(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """What is sent one after another: alike on ranks of all devices, since a GPU's copies and sends alternate."""
    return (x,) if x.nbytes <= PIECE_BYTES else torch.split(x.reshape(-1).view(torch.uint8), PIECE_BYTES)


class _NcclWork:
    __slots__ = ("_work",)

    def __init__(self, work: Any) -> None:
        self._work = work

    def is_done(self) -> bool:
        return bool(self._work.is_completed())

    def wait(self, timeout_s: float) -> bool:
        self._work.wait()  # makes the current stream wait
        return True


def _begin(start: Callable[..., Any], wire: torch.Tensor, peer: int, tag: int) -> Any:
    try:
        return start([wire], peer, tag)
    except RuntimeError as error:
        _raise_lost(error)
        raise


def _raise_lost(error: RuntimeError) -> None:
    """Raises ConnectionError where gloo's error says that a peer is gone."""
    reason = _reason(error)
    if any(sign in reason for sign in ("onnection", "pair closure", "roken pipe")) or "gloo/transport" in str(error):
        raise ConnectionError(reason) from error


@lru_cache(maxsize=64)
def _limit(timeout_s: float) -> timedelta:
    return timedelta(seconds=timeout_s)


def _host_like(x: torch.Tensor) -> torch.Tensor:
    """`x` itself, or for a tensor on another device an empty one in host memory."""
    return x if x.is_cpu else torch.empty_like(x, device="cpu")


def _reason(error: Exception) -> str:
    """The first sentence of a message, without the C++ source line that gloo puts before it."""
    text = str(error).splitlines()[0]
    if text.startswith("["):
        text = text.partition("] ")[2]
    return text.partition(". ")[0]
