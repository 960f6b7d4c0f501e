"""The communicator: transfers between the ranks of one group, numbered, timed, and bounded in how long they wait."""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, Literal, NoReturn, Self, TypeVar, overload

import torch

from phalanx.comm.board import Call, WaitBoard, find_causes, named, whereabouts
from phalanx.comm.group import GroupSpec
from phalanx.comm.ledger import UNKNOWN_S
from phalanx.comm.work import FINISHED, GroupBrokenError, PeerLostError, TimedWork, WaitTimeoutError, Work
from phalanx.errors import CommError
from phalanx.kernels import Graph, Graphs, Recording, add_rms_norm
from phalanx.kernels.names import in_range, profiled

ReduceOp = Literal["sum", "max"]
Result = TypeVar("Result")

FUSED = "fused_all_reduce_rms_norm"

DTYPES = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8)
)


FP8 = frozenset((torch.float8_e4m3fn, torch.float8_e5m2))
"""Moved, as the bytes that they are; not added up."""


class Handle(Generic[Result]):
    """An asynchronous operation under way. Every handle must be waited for before its communicator is closed."""

    __slots__ = ("_call", "_communicator", "_layer", "_result", "_started_s", "_starting_s", "_work")

    def __init__(
        self, communicator: Communicator, call: Call, result: Result, work: Work, started_s: float, starting_s: float
    ) -> None:
        self._communicator = communicator
        self._call = call
        self._layer = communicator.ledger.layer
        self._result = result
        self._work: Work | None = work
        self._started_s = started_s
        self._starting_s = starting_s

    def wait(self) -> Result:
        """Blocks until the operation is done; its tensor, or None for a barrier. May be called again, at no cost.

        Raises WaitTimeoutError past the communicator's limit, PeerLostError where a rank has gone, GroupBrokenError
        where the group failed earlier.
        """
        if self._work is not None:
            ledger = self._communicator.ledger
            present, ledger.layer = ledger.layer, self._layer  # it belongs to the layer that started it
            try:
                self._communicator._finish(self._call, self._work, self._started_s, self._starting_s)
            finally:
                ledger.layer = present
            self._work = None
        return self._result


class Communicator(ABC):
    """One rank's end of a group of ranks, numbered 0 to `size` - 1.

    Every rank of the group makes the same collective calls in the same order, with tensors of the same dtype and, where
    nothing else is said, the same shape. Collectives are numbered from 1 in the group; sends and receives from 1
    between each ordered pair of ranks, and they match in that order. Tensors are contiguous and live on the group's
    device.

    A call blocks until its result may be used and returns it; with `async_op=True` it returns a `Handle` at once, and
    the tensors belong to the transfer until `Handle.wait` returns. Both limit the wait to `timeout_s` seconds.

    After a failure (a limit passed, a rank gone) the group is broken: its connections are closed, so that no other rank
    goes on waiting, and every further call raises GroupBrokenError.

    A communicator is used from one thread; only `abort` may be called from another. As a context manager it closes
    itself.

    A backend derives from this class and implements the `_start_*` hooks, which enqueue a transfer and return its
    `Work`, with arguments already checked; `_abort`, which fails every pending operation of this group, here and on the
    other ranks, and may be called twice and from any thread; and `_close`, which releases what is held.
    """

    backend: ClassVar[str]
    in_background: ClassVar[bool] = False
    """Whether asynchronous transfers go on by themselves, and leave the cores to whoever started them."""
    capturable: ClassVar[bool] = False
    """Whether blocking operations may be captured into a CUDA graph, after the same were run outside of one."""

    def __init__(self, spec: GroupSpec) -> None:
        self.rank = spec.rank
        self.size = spec.size
        self.group = spec.name
        self.device = torch.device(spec.device)
        self.timeout_s = spec.timeout_s
        self.reason = spec.reason  # why this backend was chosen
        self.machines = spec.machines  # the number of each rank's machine; empty where nobody asked
        self.ledger = spec.ledger
        self._on_host = self.device.type == "cpu"
        self._broken: str | None = None
        self._failure: CommError | None = None  # what broke the group behind the calls, for the next one to raise
        self._breaking = threading.Lock()
        self._closed = False
        self._stopped = False  # broken or closed
        self._clock_s = spec.ledger.clock_s
        self._num_open = 0
        self._in_background = False  # the operation being started is asynchronous
        self._num_sent: dict[tuple[str, int], int] = {}
        tick_s = min(0.5, spec.timeout_s / 8)
        store = spec.store if spec.size > 1 else None
        self._board = WaitBoard(store, spec.name, spec.rank, spec.size, spec.ledger, tick_s, spec.member)
        weakref.finalize(self, self._board.close)

    # ---- operations ----

    @overload
    def all_reduce(
        self, x: torch.Tensor, *, op: ReduceOp = "sum", async_op: Literal[False] = False
    ) -> torch.Tensor: ...
    @overload
    def all_reduce(self, x: torch.Tensor, *, op: ReduceOp = "sum", async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def all_reduce(
        self, x: torch.Tensor, *, op: ReduceOp = "sum", async_op: bool = False
    ) -> torch.Tensor | Handle[torch.Tensor]:
        """Replaces `x`, of any shape, on every rank by the sum or maximum over the ranks. Returns `x`."""
        self._check_tensor("all_reduce", x)
        if op not in ("sum", "max"):
            raise CommError(f"all_reduce in group {self.group!r}: op must be 'sum' or 'max', found {op!r}")
        call = self._number("all_reduce", x.nbytes)
        return self._run(call, x, async_op, self._start_all_reduce, x, op)

    def fused_all_reduce_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, residual_sum) of `x` [..., N], whose sum over the ranks is added to `residual`, of the same shape
        and dtype, and normalised by `weight` [N]: `rms_norm(sum(x) + residual, weight, eps)`, each step rounded to the
        dtype. One operation, with one number. `x` belongs to it: afterwards its memory holds anything, perhaps a
        result. `residual` and `weight` are the same on all ranks, and left as they were.
        """
        self._check_norm(x, residual, weight)
        call = self._number(FUSED, x.nbytes)
        self._run(call, x, False, self._start_all_reduce, x, "sum")
        return add_rms_norm(x, residual, weight, eps)

    def record_all_reduce(self, recording: Recording, x: torch.Tensor) -> None:
        """The sum over the ranks, in place, in every replay of what is being recorded, of the layer that the ledger is
        at.
        """
        ledger, layer = self.ledger, self.ledger.layer

        def reduce() -> None:
            ledger.layer = layer
            self.all_reduce(x)

        recording.by_hand(reduce)

    def record_fused_all_reduce_rms_norm(
        self, recording: Recording, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`fused_all_reduce_rms_norm` in every replay of what is being recorded, of the layer that the ledger is at;
        where its results will be.
        """
        normed, total = torch.empty_like(x), torch.empty_like(x)
        ledger, layer = self.ledger, self.ledger.layer

        def reduce() -> None:
            ledger.layer = layer
            results = self.fused_all_reduce_rms_norm(x, residual, weight, eps)
            normed.copy_(results[0])
            total.copy_(results[1])

        recording.by_hand(reduce)
        return normed, total

    @overload
    def all_gather(
        self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, async_op: Literal[False] = False
    ) -> torch.Tensor: ...
    @overload
    def all_gather(
        self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, async_op: Literal[True]
    ) -> Handle[torch.Tensor]: ...
    def all_gather(
        self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, async_op: bool = False
    ) -> torch.Tensor | Handle[torch.Tensor]:
        """A new tensor: every rank's `x` [rows, ...] one after another along dimension 0, in the order of ranks.

        sizes: rows of each rank, the same on all ranks, where they are unlike; may contain zeros.
        """
        self._check_tensor("all_gather", x, moves=True)
        rows = self._check_rows("all_gather", x, sizes)
        if sizes is not None:
            if sizes[self.rank] != rows:
                raise CommError(
                    f"all_gather in group {self.group!r}: rank {self.rank} holds {rows} rows, but sizes "
                    f"{list(sizes)} say {sizes[self.rank]}"
                )
            sizes = None if min(sizes) == max(sizes) else tuple(sizes)
        num_rows = rows * self.size if sizes is None else sum(sizes)
        output = x.new_empty((num_rows, *x.shape[1:]))
        call = self._number("all_gather", output.nbytes)
        return self._run(call, output, async_op, self._start_all_gather, _bytes(output), _bytes(x), sizes)

    @overload
    def reduce_scatter(
        self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, async_op: Literal[False] = False
    ) -> torch.Tensor: ...
    @overload
    def reduce_scatter(
        self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, async_op: Literal[True]
    ) -> Handle[torch.Tensor]: ...
    def reduce_scatter(
        self, x: torch.Tensor, *, sizes: Sequence[int] | None = None, async_op: bool = False
    ) -> torch.Tensor | Handle[torch.Tensor]:
        """A new tensor: this rank's rows of the sum of `x` [rows, ...] over the ranks. `x` is left as it was.

        sizes: rows that each rank receives, adding up to the rows of `x`; None for equal parts.
        """
        self._check_tensor("reduce_scatter", x)
        rows = self._check_rows("reduce_scatter", x, sizes)
        if sizes is None:
            if rows % self.size:
                raise CommError(
                    f"reduce_scatter in group {self.group!r}: {rows} rows do not divide into {self.size} equal parts; "
                    "give sizes, the rows that each rank receives"
                )
            mine = rows // self.size
        else:
            if sum(sizes) != rows:
                raise CommError(
                    f"reduce_scatter in group {self.group!r}: sizes {list(sizes)} add up to {sum(sizes)}, not to the "
                    f"{rows} rows of the tensor"
                )
            mine = sizes[self.rank]
            sizes = None if min(sizes) == max(sizes) else tuple(sizes)
        output = x.new_empty((mine, *x.shape[1:]))
        call = self._number("reduce_scatter", x.nbytes)
        return self._run(call, output, async_op, self._start_reduce_scatter, output, x, sizes)

    @overload
    def broadcast(self, x: torch.Tensor, root: int, *, async_op: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def broadcast(self, x: torch.Tensor, root: int, *, async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def broadcast(self, x: torch.Tensor, root: int, *, async_op: bool = False) -> torch.Tensor | Handle[torch.Tensor]:
        """Replaces `x`, of any shape, on every rank by the `x` of rank `root`. Returns `x`."""
        self._check_tensor("broadcast", x, moves=True)
        self._check_rank("broadcast", "root", root)
        call = self._number("broadcast", x.nbytes)
        return self._run(call, x, async_op, self._start_broadcast, _bytes(x), root)

    @overload
    def send(self, x: torch.Tensor, to: int, *, async_op: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def send(self, x: torch.Tensor, to: int, *, async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def send(self, x: torch.Tensor, to: int, *, async_op: bool = False) -> torch.Tensor | Handle[torch.Tensor]:
        """Hands `x` to rank `to`. Done when `x` may be changed, which may be before it has arrived. Returns `x`."""
        self._check_tensor("send", x, moves=True)
        self._check_peer("send", "to", to)
        call = self._number("send", x.nbytes, to)
        return self._run(call, x, async_op, self._start_send, _bytes(x), to)

    @overload
    def recv(self, x: torch.Tensor, source: int, *, async_op: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def recv(self, x: torch.Tensor, source: int, *, async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def recv(self, x: torch.Tensor, source: int, *, async_op: bool = False) -> torch.Tensor | Handle[torch.Tensor]:
        """Fills `x` with the next tensor that rank `source` sends here, of the same shape and dtype. Returns `x`."""
        self._check_tensor("recv", x, moves=True)
        self._check_peer("recv", "source", source)
        call = self._number("recv", x.nbytes, source)
        return self._run(call, x, async_op, self._start_recv, _bytes(x), source)

    @overload
    def barrier(self, *, async_op: Literal[False] = False) -> None: ...
    @overload
    def barrier(self, *, async_op: Literal[True]) -> Handle[None]: ...
    def barrier(self, *, async_op: bool = False) -> Handle[None] | None:
        """Done, for the calling thread too, when every rank has made this call."""
        self._check_usable("barrier")
        return self._run(self._number("barrier", 0), None, async_op, self._start_barrier)

    def captured(self, graphs: Graphs, run: Callable[[], None]) -> Graph:
        """`graphs.capture(run)`, of which every replay counts as the calls in it. All ranks capture alike."""
        return graphs.capture(run)

    def check(self) -> None:
        """Raises what has broken the group meanwhile, if anything has.

        Where results are ordered by a GPU's streams, an operation may fail after the call has returned, and streams run
        on without its result: what was copied to the host is good only if this returns afterwards.
        """
        if self._stopped:
            self._check_usable("check")

    def abort(self) -> None:
        """Fails every pending operation of the group, on this rank and, through closed connections, on the others."""
        if not self._stopped:
            self._break(f"it was aborted on rank {self.rank}")

    def close(self) -> None:
        """Releases connections and threads. Operations still under way are aborted. May be called again."""
        if self._closed:
            return
        if self._num_open:
            self.abort()
        self._closed = self._stopped = True
        self._board.close()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- for a communicator that this one is a part of: without checks, number, ledger and notice on the board ----

    def start(self, op: str, *arguments: object, async_op: bool) -> Work:
        """Starts an operation by the arguments of its hook."""
        self._in_background = async_op
        work: Work = getattr(self, f"_start_{op}")(*arguments)
        return work

    def perform(self, op: str, timeout_s: float, *arguments: object) -> bool:
        """An operation from start to end, by the arguments of its hook; returns and raises as `Work.wait` does."""
        return self.start(op, *arguments, async_op=False).wait(timeout_s)

    # ---- hooks of a backend ----

    @abstractmethod
    def _start_all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Work: ...

    @abstractmethod
    def _start_all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        """Fills `output`. sizes: rows by rank where unlike; None where all ranks hold as many as `x`."""

    @abstractmethod
    def _start_reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Work:
        """Fills `output`. sizes: rows by rank where unlike; None where all ranks receive as many."""

    @abstractmethod
    def _start_broadcast(self, x: torch.Tensor, root: int) -> Work: ...

    @abstractmethod
    def _start_send(self, x: torch.Tensor, to: int) -> Work: ...

    @abstractmethod
    def _start_recv(self, x: torch.Tensor, source: int) -> Work: ...

    @abstractmethod
    def _start_barrier(self) -> Work: ...

    @abstractmethod
    def _abort(self) -> None: ...

    @abstractmethod
    def _close(self) -> None: ...

    # ---- checks: a caller's mistake raises before anything is sent, and uses up no number ----

    def _check_usable(self, op: str) -> None:
        if self._closed:
            raise CommError(f"{op} in group {self.group!r}: this communicator has been closed")
        self._raise_failure()
        if self._broken is not None:
            raise GroupBrokenError(f"{op} in group {self.group!r} cannot run: {self._broken}")

    def _check_tensor(self, op: str, x: torch.Tensor, *, moves: bool = False) -> None:
        if self._stopped:
            self._check_usable(op)
        if not (x.is_cpu if self._on_host else x.device.type == self.device.type):
            raise CommError(
                f"{op} in group {self.group!r}: the tensor is on {x.device}, but the group was made for {self.device}"
            )
        if x.dtype not in DTYPES and not (moves and x.dtype in FP8):
            allowed = ", ".join(
                sorted(str(dtype).removeprefix("torch.") for dtype in (DTYPES | FP8 if moves else DTYPES))
            )
            raise CommError(f"{op} in group {self.group!r}: dtype {x.dtype} cannot be sent; use one of {allowed}")
        if not x.is_contiguous():
            raise CommError(
                f"{op} in group {self.group!r}: the tensor of shape {list(x.shape)} and strides {list(x.stride())} is "
                "not contiguous; pass a contiguous one, since the result is written in place"
            )

    def _check_rows(self, op: str, x: torch.Tensor, sizes: Sequence[int] | None) -> int:
        if x.dim() == 0:
            raise CommError(f"{op} in group {self.group!r}: needs a tensor of at least one dimension, found a scalar")
        if sizes is not None and (len(sizes) != self.size or min(sizes) < 0):
            raise CommError(
                f"{op} in group {self.group!r}: sizes must be {self.size} numbers of rows, one a rank and none below "
                f"0, found {list(sizes)}"
            )
        return x.shape[0]

    def _check_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        for tensor in (x, residual, weight):
            self._check_tensor(FUSED, tensor)
        if x.dim() == 0 or residual.shape != x.shape or weight.shape != x.shape[-1:]:
            raise CommError(
                f"{FUSED} in group {self.group!r}: x [..., N] needs a residual of its shape and a weight [N], found "
                f"{list(x.shape)}, {list(residual.shape)} and {list(weight.shape)}"
            )
        if residual.dtype != x.dtype or weight.dtype != x.dtype:
            raise CommError(
                f"{FUSED} in group {self.group!r}: x, residual and weight must be of one dtype, found {x.dtype}, "
                f"{residual.dtype} and {weight.dtype}"
            )

    def _check_rank(self, op: str, name: str, rank: int) -> None:
        if not 0 <= rank < self.size:
            raise CommError(
                f"{op} in group {self.group!r}: {name} must be a rank from 0 to {self.size - 1}, found {rank}"
            )

    def _check_peer(self, op: str, name: str, rank: int) -> None:
        self._check_rank(op, name, rank)
        if rank == self.rank:
            raise CommError(f"{op} in group {self.group!r}: {name} is rank {rank} itself; name another rank")

    # ---- one operation from start to end ----

    def _number(self, op: str, num_bytes: int, peer: int | None = None) -> Call:
        if peer is None:
            seq = self._board.num_started = self._board.num_started + 1
        else:
            seq = self._num_sent[op, peer] = self._num_sent.get((op, peer), 0) + 1
        return op, seq, peer, num_bytes

    def _run(
        self, call: Call, result: Result, async_op: bool, start: Callable[..., Work], *arguments: object
    ) -> Result | Handle[Result]:
        if profiled():
            start = in_range(f"start {call[0]}", f"#{call[1]} of {self.group}", start)
        started_s = self._clock_s()
        self._num_open += 1
        self._in_background = async_op
        try:
            # Every rank knows alike where there is nothing to move; only a barrier means something without it.
            work = start(*arguments) if call[3] or not arguments else FINISHED
        except CommError:  # the caller's mistake: nothing was started
            self._num_open -= 1
            raise
        except (RuntimeError, ConnectionError) as error:
            self._fail(call, error)
        if async_op:
            return Handle(self, call, result, work, started_s, self._clock_s() - started_s)
        self._finish(call, work, started_s)
        return result

    def _finish(self, call: Call, work: Work, started_s: float, starting_s: float | None = None) -> None:
        """Waits for an operation and writes it down. starting_s: time that an asynchronous start took, else None."""
        if self._stopped:
            self._check_usable(self._describe(call))
        # A blocking call is exposed from its start; an asynchronous one while it started, and from here on.
        blocked_from_s = started_s if starting_s is None else self._clock_s() - starting_s
        self._board.waiting = call
        wait = in_range(call[0], f"#{call[1]} of {self.group}", work.wait) if profiled() else work.wait
        try:
            if not wait(self.timeout_s):
                self._give_up(call)
        except (RuntimeError, ConnectionError) as error:
            self._fail(call, error)
        finally:
            self._board.waiting = None
        self._num_open -= 1
        ended_s = self._clock_s()
        if isinstance(work, TimedWork):
            took_s = work.took_s
        else:
            took_s = ended_s - started_s if starting_s is None else UNKNOWN_S
        self._record(call, started_s, ended_s - blocked_from_s, ended_s, took_s)

    def _record(self, call: Call, started_s: float, waited_s: float, ended_s: float, took_s: float) -> None:
        op, seq, peer, num_bytes = call
        peer = -1 if peer is None else peer
        self.ledger.record(seq, self.group, op, num_bytes, started_s, waited_s, ended_s, peer, took_s=took_s)

    def _describe(self, call: Call) -> str:
        op, seq, peer, num_bytes = call
        ranks = "" if peer is None else f" {'to' if op == 'send' else 'from'} rank {peer}"
        layer = "" if self.ledger.layer < 0 else f" in layer {self.ledger.layer}"
        return f"{op} #{seq}{ranks} of group {self.group!r}{layer} ({num_bytes:,} bytes)"

    def _fail(self, call: Call, error: Exception) -> NoReturn:
        what, peer = self._describe(call), call[2]
        self._raise_failure()
        if self._broken is not None:
            raise GroupBrokenError(f"{what} on rank {self.rank} ended early: {self._broken}") from error
        if isinstance(error, ConnectionError):
            who = f"rank {peer}" if peer is not None else "a rank of the group"
            self._break(f"the connection to {who} was lost in {what}")
            raise PeerLostError(
                f"{what} on rank {self.rank}: the connection to {who} was lost ({error}). It has most likely died or "
                f"given up: its own error is the cause, this is a symptom{self._who([peer])}",
                peer,
            ) from error
        self._break(f"{what} failed")
        raise self._failure_of(what, error) from error

    def _failure_of(self, what: str, error: Exception) -> CommError:
        return CommError(f"{what} failed on rank {self.rank}: {error}")

    def _give_up(self, call: Call) -> NoReturn:
        error = self._late(call)
        self._break(f"{self._describe(call)} waited longer than {self.timeout_s:g} s")
        raise error

    def _late(self, call: Call) -> WaitTimeoutError:
        """The error of an operation past its limit. Asks the others where they are, which takes a while."""
        what, (op, seq, peer, _) = self._describe(call), call
        statuses = self._board.read_others()
        others = [rank for rank in range(self.size) if rank != self.rank]
        arrived = [rank for rank in others if peer is None and rank in statuses and statuses[rank].num_started >= seq]
        missing = [rank for rank in others if rank not in arrived] if peer is None else [peer]
        causes = find_causes(missing, statuses, self.group, self.size, self.rank, self._board.num_started)
        told = others if peer is None else sorted({peer, *causes.guilty, *causes.elsewhere})
        notes = [
            f"rank {rank} {whereabouts(op, seq, self.group, statuses.get(rank), rank in arrived)}" for rank in told
        ]
        return WaitTimeoutError(
            f"{what} on rank {self.rank} waited longer than {self.timeout_s:g} s; not arrived: "
            f"{named(missing) or 'no rank: all have started it'} ({'; '.join(notes)}). "
            f"{causes.told([rank for rank in causes.guilty or missing if self._is_elsewhere(rank)])}; if it "
            f"is only slow, raise the limit (timeout_s){self._who(sorted({*missing, *causes.guilty}))}",
            missing,
            causes.guilty,
        )

    def _is_elsewhere(self, rank: int) -> bool:
        """Whether a rank is known to be on another machine."""
        return bool(self.machines) and self.machines[rank] != self.machines[self.rank]

    def _who(self, others: Sequence[int | None]) -> str:
        """What this rank and others are, beside their numbers, as the end of a message."""
        known = {rank: member for rank, member in sorted(self._board.members.items()) if member}
        told = [f"rank {rank} is {member}" for rank, member in known.items() if rank == self.rank or rank in others]
        return f". In this group {', '.join(told)}" if told else ""

    def _break(self, why: str, failure: CommError | None = None) -> None:
        """Closes the connections, so that ranks waiting for this one or for each other learn of the failure at once.

        failure: for the next call of the communicator's own thread to raise, where this is another one. The first
        reason stands.
        """
        with self._breaking:
            if self._broken is None:
                self._broken, self._failure = why, failure
            self._stopped = True
        self._abort()

    def _raise_failure(self) -> None:
        with self._breaking:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.dtype in FP8 else x
