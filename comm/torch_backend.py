"""Communicators over torch.distributed's process groups: gloo for any CPU, NCCL for one GPU a rank.

The process-group objects are made directly, never through torch's global default group, so that any number of groups
and formations live in one process.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from phalanx.comm.combine import NARROW
from phalanx.comm.communicator import Communicator, ReduceOp
from phalanx.comm.group import GroupSpec
from phalanx.comm.rendezvous import meet
from phalanx.comm.work import Work
from phalanx.errors import CommError

_REDUCE = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
_TAG = 0
_ABORT_TAG = 1  # nothing is ever sent under it


class TorchCommunicator(Communicator):
    """What the two have in common: meeting on the store, then a process group of this group's own."""

    in_background = True

    def __init__(self, spec: GroupSpec) -> None:
        if spec.store is None:
            raise CommError(f"group {spec.name!r}: a group of {spec.size} needs a store to meet on")
        meet(spec.store, spec.name, spec.rank, spec.size, spec.timeout_s)
        super().__init__(spec)
        # Typed loosely: torch's stubs leave out the overloads that take a single tensor.
        try:
            self._process_group: Any = self._create_process_group(spec, spec.store)
        except RuntimeError as error:
            self._board.close()
            raise CommError(
                f"rank {spec.rank} of group {spec.name!r} cannot connect to the others from "
                f"{spec.address or spec.device}: {_reason(error)}; name the network interface that reaches them"
            ) from error

    @abstractmethod
    def _create_process_group(self, spec: GroupSpec, store: Store) -> object: ...

    def _close(self) -> None:
        del self._process_group


class GlooCommunicator(TorchCommunicator):
    """Over TCP, for any device. Made for the CPU: tensors of other devices pass through host memory, blocking.

    Sums of bfloat16 and float16 travel and are added in float32, then are rounded once: gloo's own rounds after each
    addition (mean error of a sum over 4 ranks in bfloat16 1.6 times that of one rounding). All else travels as it is.
    Of a tensor that does not fit what the other rank sent, gloo ends the process.
    """

    backend = "gloo"

    def _create_process_group(self, spec: GroupSpec, store: Store) -> object:
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=spec.address)]
        options._timeout = timedelta(seconds=spec.timeout_s)  # for connecting
        process_group: Any = gloo(store, spec.rank, spec.size, options)
        # From now on gloo's own limit must not strike first: ours names the ranks that are missing.
        process_group._set_default_timeout(timedelta(seconds=2 * spec.timeout_s + 10))
        return cast(object, process_group)

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

    def _start_send(self, x: torch.Tensor, to: int, tag: int = _TAG) -> Work:
        wire = self._on_wire(x)
        return _GlooWork(_begin(self._process_group.send, wire, to, tag), wire, None)

    def _start_recv(self, x: torch.Tensor, source: int, tag: int = _TAG) -> Work:
        wire = _host_like(x)
        work = _begin(self._process_group.recv, wire, source, tag)
        return _GlooWork(work, wire, None if wire is x else lambda: x.copy_(wire))

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

    @staticmethod
    def _on_wire(x: torch.Tensor, *, widen: bool = False) -> torch.Tensor:
        """`x` as gloo sends it: itself wherever it can be."""
        if x.is_cpu and not (widen and x.dtype in NARROW):
            return x
        return x.to("cpu", torch.float32 if widen and x.dtype in NARROW else x.dtype)


class NcclCommunicator(TorchCommunicator):
    """Over NCCL, one GPU a rank. Results are ordered by the current stream: a wait enqueues, and does not block.

    So the ledger's figures are those of the calling thread, and a rank that never comes is noticed by torch's own
    watchdog, after the same limit, which ends the process. Only `barrier` blocks the thread, up to the limit.
    """

    backend = "nccl"

    def _create_process_group(self, spec: GroupSpec, store: Store) -> object:
        index = self.device.index if self.device.index is not None else torch.cuda.current_device()
        self.device = torch.device("cuda", index)
        nccl: Any = dist.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = timedelta(seconds=spec.timeout_s)
        return cast(object, nccl(store, spec.rank, spec.size, options))

    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work:
        return _NcclWork(self._process_group.allreduce(x, _REDUCE[op]))

    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        if sizes is None:
            return _NcclWork(self._process_group._allgather_base(output, x))
        return _NcclWork(self._process_group.allgather([list(torch.split(output, list(sizes)))], [x]))

    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        if sizes is None:
            return _NcclWork(self._process_group._reduce_scatter_base(output, x))
        return _NcclWork(self._process_group.reduce_scatter([output], [list(torch.split(x, list(sizes)))]))

    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work:
        return _NcclWork(self._process_group.broadcast(x, root))

    def _start_send(self, x: torch.Tensor, to: int) -> Work:
        return _NcclWork(self._process_group.send([x], to, _TAG))

    def _start_recv(self, x: torch.Tensor, source: int) -> Work:
        return _NcclWork(self._process_group.recv([x], source, _TAG))

    def _start_barrier(self) -> Work:
        flag = torch.zeros(1, device=self.device)
        return _NcclWork(self._process_group.allreduce(flag, dist.ReduceOp.SUM), blocks_thread=True)

    def _abort(self) -> None:
        self._process_group.abort()

    def _close(self) -> None:
        if self._broken is None:
            self._process_group.shutdown()
        super()._close()


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


class _NcclWork:
    __slots__ = ("_blocks_thread", "_work")

    def __init__(self, work: Any, *, blocks_thread: bool = False) -> None:
        self._work = work
        self._blocks_thread = blocks_thread

    def wait(self, timeout_s: float) -> bool:
        if not self._blocks_thread:
            self._work.wait()
            return True
        try:
            self._work.wait(_limit(timeout_s))
        except RuntimeError as error:
            if "imeout" in str(error) or "imed out" in str(error):
                return False
            raise
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
