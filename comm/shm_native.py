"""The communicator between processes of one machine with its blocking calls made by the native library."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NoReturn, TypeVar, overload

import torch

from phalanx.comm.board import Call
from phalanx.comm.communicator import FUSED, Handle, ReduceOp
from phalanx.comm.group import GroupSpec
from phalanx.comm.replayed import Failure, ReplayedTransfers
from phalanx.comm.shm import ShmCommunicator
from phalanx.comm.shm_calls import DTYPE_CODES, WINDOW, unlike_error
from phalanx.comm.shm_segment import RING_BYTES
from phalanx.comm.shm_stream import Stream
from phalanx.comm.work import Work
from phalanx.errors import CommError
from phalanx.kernels import Recording
from phalanx.kernels.names import in_range, profiled
from phalanx.native import find_native

if TYPE_CHECKING:
    from phalanx import _native

Result = TypeVar("Result")
Ended = int | Failure  # who arrived last, or what went wrong

_NORMED = {dtype: DTYPE_CODES[dtype] for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_LATE, _ABORTED, _LEFT, _ENDED, _UNLIKE = range(1, 6)  # `End` in `csrc/waiter.hpp`


class NativeShmCommunicator(ShmCommunicator):
    """A blocking call that has nothing under way before it is one call of the library, which copies, waits and adds
    without the interpreter's lock. It leaves the shared memory as the steps of the base class would, which carry on the
    rest: asynchronous calls, and those behind them. So ranks with and without the library make up one group, and get
    the same bits.
    """

    def __init__(self, spec: GroupSpec, library: ModuleType) -> None:
        super().__init__(spec)
        self._library = library
        segment = self._segment
        self._group: _native.Group = library.Group(
            segment,
            segment.address,
            segment.layout(),
            self.rank,
            self._waiter.pidfds,
            _core_for_each(spec),
            WINDOW,
            torch.Tensor,
        )

    # ---- the two that stand between the layers of a model, where every microsecond counts ----

    @overload
    def all_reduce(
        self, x: torch.Tensor, *, op: ReduceOp = "sum", async_op: Literal[False] = False
    ) -> torch.Tensor: ...
    @overload
    def all_reduce(self, x: torch.Tensor, *, op: ReduceOp = "sum", async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def all_reduce(
        self, x: torch.Tensor, *, op: ReduceOp = "sum", async_op: bool = False
    ) -> torch.Tensor | Handle[torch.Tensor]:
        if async_op or op not in ("sum", "max") or self._stopped or self._collectives.queue or profiled():
            return super().all_reduce(x, op=op, async_op=async_op)  # type: ignore[call-overload, no-any-return]
        num_bytes = x.nbytes
        board = self._board
        board.num_started = seq = board.num_started + 1
        board.waiting = call = ("all_reduce", seq, None, num_bytes)
        started_s = self._clock_s()
        last = self._group.all_reduce(x, op == "max", self.timeout_s)
        if last is None:
            board.num_started, board.waiting = seq - 1, None
            return super().all_reduce(x, op=op)
        if isinstance(last, tuple):
            self._explain(call, last)
        board.waiting = None
        ended_s = self._clock_s()
        self.ledger.record(seq, self.group, "all_reduce", num_bytes, started_s, ended_s - started_s, ended_s, -1, last)
        return x

    def fused_all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._stopped or self._collectives.queue:
            return super().fused_all_reduce_rms_norm(x, residual, weight, eps)
        residual_sum = torch.empty_like(residual)
        num_bytes = x.nbytes
        native = self._group.all_reduce_rms_norm
        board = self._board
        board.num_started = seq = board.num_started + 1
        if profiled():
            native = in_range(FUSED, f"#{seq} of {self.group}", native)
        board.waiting = call = (FUSED, seq, None, num_bytes)
        started_s = self._clock_s()
        last = native(x, residual_sum, residual, weight, eps, self.timeout_s)
        if last is None:
            board.num_started, board.waiting = seq - 1, None
            return super().fused_all_reduce_rms_norm(x, residual, weight, eps)
        if isinstance(last, tuple):
            self._explain(call, last)
        board.waiting = None
        ended_s = self._clock_s()
        self.ledger.record(seq, self.group, FUSED, num_bytes, started_s, ended_s - started_s, ended_s, -1, last)
        return x, residual_sum

    def record_all_reduce(self, recording: Recording, x: torch.Tensor) -> None:
        self._check_tensor("all_reduce", x)
        code = DTYPE_CODES.get(x.dtype)
        if code is None or not x.nbytes:
            super().record_all_reduce(recording, x)
            return
        transfers = recording.followed_by(self, self._replayed)
        transfers.add("all_reduce", x.nbytes)
        self._group.record_all_reduce(transfers.native, x.data_ptr(), x.nbytes, code, False, self.timeout_s)

    def record_fused_all_reduce_rms_norm(
        self, recording: Recording, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_norm(x, residual, weight)
        code, width = _NORMED.get(x.dtype), x.shape[-1]
        if code is None or not x.nbytes:
            return super().record_fused_all_reduce_rms_norm(recording, x, residual, weight, eps)
        residual_sum = torch.empty_like(residual)
        transfers = recording.followed_by(self, self._replayed)
        transfers.add(FUSED, x.nbytes)
        pointers = x.data_ptr(), residual_sum.data_ptr(), residual.data_ptr(), weight.data_ptr()
        rows = x.numel() // width
        self._group.record_all_reduce_rms_norm(transfers.native, *pointers, eps, rows, width, code, self.timeout_s)
        return x, residual_sum

    def _replayed(self) -> ReplayedTransfers:
        native = self._library.Transfers()
        return ReplayedTransfers(native, self._board, self.ledger, self.group, self._before_replay, self._explain)

    def _before_replay(self, first: Call) -> None:
        """Raises where the group is broken, or transfers that are under way do not end in time."""
        if self._stopped:
            self._check_usable(first[0])
        if queue := self._collectives.queue:
            try:
                if not queue[-1].wait(self.timeout_s):
                    self._give_up(first)
            except (RuntimeError, ConnectionError) as error:
                self._fail(first, error)

    # ---- any other ----

    def _run(
        self, call: Call, result: Result, async_op: bool, start: Callable[..., Work], *arguments: object
    ) -> Result | Handle[Result]:
        op, _, _, num_bytes = call
        if async_op or not (num_bytes or not arguments) or op == FUSED or self._stream(call).queue:
            return super()._run(call, result, async_op, start, *arguments)
        self._run_native(call, getattr(self, f"_native_{op}"), *arguments)
        return result

    def _run_native(self, call: Call, native: Callable[..., Ended], *arguments: object) -> None:
        op, seq, peer, num_bytes = call
        self._board.waiting = call
        started_s = self._clock_s()
        if profiled():
            native = in_range(op, f"#{seq} of {self.group}", native)
        last = native(*arguments)
        if isinstance(last, tuple):
            self._explain(call, last)
        self._board.waiting = None
        ended_s = self._clock_s()
        peer = -1 if peer is None else peer
        self.ledger.record(seq, self.group, op, num_bytes, started_s, ended_s - started_s, ended_s, peer, last)

    def _explain(self, call: Call, failure: Failure) -> NoReturn:
        """Raises what the same failure raises without the library."""
        try:
            error = self._error(failure)
            if error is None:
                self._give_up(call)
            self._fail(call, error)
        finally:
            self._board.waiting = None

    def _error(self, failure: Failure) -> Exception | None:
        """What the steps of the base class would have raised; None where a rank is late."""
        end, rank, header, expected = failure
        rank = self._called(rank)
        if end == _LATE:
            return None
        if end == _UNLIKE:
            return unlike_error(rank, header, expected)
        if end == _ABORTED:
            return ConnectionError(f"rank {rank} ended the group")
        assert end in (_LEFT, _ENDED), end
        return ConnectionError(f"rank {rank} has {'closed its end' if end == _LEFT else 'ended'}")

    def perform(self, op: str, timeout_s: float, *arguments: object) -> bool:
        self.timeout_s = timeout_s
        ended: Ended = getattr(self, f"_native_{op}")(*arguments)
        if not isinstance(ended, tuple):
            return True
        if (error := self._error(ended)) is not None:
            raise error
        return False

    def _stream(self, call: Call) -> Stream:
        """The transfers that must end before this one."""
        op, _, peer, _ = call
        if peer is None:
            return self._collectives
        return self._sends[peer] if op == "send" else self._receives[peer]

    def _native_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Ended:
        ended = self._group.all_reduce(x, op == "max", self.timeout_s)
        assert ended is not None
        return ended

    def _native_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Ended:
        row_bytes = output.nbytes // output.shape[0]
        counts = [rows * row_bytes for rows in sizes or [x.shape[0]] * self.size]
        return self._group.all_gather(output.data_ptr(), x.data_ptr(), counts, DTYPE_CODES[x.dtype], self.timeout_s)

    def _native_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Ended:
        row = x.numel() // x.shape[0]
        counts = [rows * row for rows in sizes or [output.shape[0]] * self.size]
        return self._group.reduce_scatter(output.data_ptr(), x.data_ptr(), counts, DTYPE_CODES[x.dtype], self.timeout_s)

    def _native_broadcast(self, x: torch.Tensor, root: int) -> Ended:
        return self._group.broadcast(x.data_ptr(), x.nbytes, DTYPE_CODES[x.dtype], root, self.timeout_s)

    def _native_barrier(self) -> Ended:
        return self._group.barrier(self.timeout_s)

    def _native_send(self, x: torch.Tensor, to: int) -> Ended:
        return self._group.send(x.data_ptr(), x.nbytes, DTYPE_CODES[x.dtype], to, self.timeout_s)

    def _native_recv(self, x: torch.Tensor, source: int) -> Ended:
        self._num_posted_slots[source] += -(-x.nbytes // RING_BYTES)
        return self._group.recv(x.data_ptr(), x.nbytes, DTYPE_CODES[x.dtype], source, self.timeout_s)

    def _combine(self, out: torch.Tensor, parts: Sequence[torch.Tensor], op: ReduceOp) -> None:
        """Of the asynchronous calls, too."""
        addresses = [part.data_ptr() for part in parts]
        self._library.combine(out.data_ptr(), addresses, out.numel(), DTYPE_CODES[out.dtype], op == "max")

    def _close(self) -> None:
        del self._group  # which refers to the memory
        super()._close()


def _core_for_each(spec: GroupSpec) -> bool:
    """Whether the ranks of a group may run on as many cores as they are. Told by every rank to every other."""
    assert spec.store is not None
    cores = {core for rank in range(spec.size) for core in json.loads(spec.store.get(f"cores/{rank}"))}
    return len(cores) >= spec.size


class ShmTorchCommunicator(ShmCommunicator):
    """Without the library even where it is built: for tests and comparisons."""

    backend = "shm-torch"


def create_shm(spec: GroupSpec, *, forced_torch: bool = False) -> ShmCommunicator:
    """One rank's end of a group, with the native library where it is built and nothing else is asked for."""
    if spec.store is None:
        raise CommError(f"group {spec.name!r}: a group of {spec.size} needs a store to meet on")
    spec.store.set(f"cores/{spec.rank}", json.dumps(sorted(os.sched_getaffinity(0))))
    if forced_torch:
        return ShmTorchCommunicator(spec)
    library = find_native().library
    return ShmCommunicator(spec) if library is None else NativeShmCommunicator(spec, library)
