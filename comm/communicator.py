"""The communicator: transfers between the ranks of one group, numbered, timed, and bounded in how long they wait."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, Literal, NoReturn, Self, TypeVar, overload

import torch

from phalanx.comm.board import RankStatus, WaitBoard
from phalanx.comm.group import GroupSpec
from phalanx.comm.work import FINISHED, GroupBrokenError, PeerLostError, WaitTimeoutError, Work
from phalanx.errors import CommError

ReduceOp = Literal["sum", "max"]
Result = TypeVar("Result")

DTYPES = frozenset(
    (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8)
)


class Handle(Generic[Result]):
    """An operation under way. Every handle must be waited for before its communicator is closed.

    op: name of the operation. seq: its number. peer: the other rank of a send or recv, else None.
    num_bytes: of the tensor operated on. started_s: on the ledger's clock. starting_s: time that an asynchronous start
    took.
    """

    __slots__ = ("_communicator", "_result", "_work", "num_bytes", "op", "peer", "seq", "started_s", "starting_s")

    def __init__(
        self, communicator: Communicator, result: Result, op: str, seq: int, peer: int | None, num_bytes: int
    ) -> None:
        self._communicator = communicator
        self._result = result
        self._work: Work | None = FINISHED
        self.op = op
        self.seq = seq
        self.peer = peer
        self.num_bytes = num_bytes
        self.started_s = communicator.ledger.clock_s()
        self.starting_s: float | None = None

    def wait(self) -> Result:
        """Blocks until the operation is done; its tensor, or None for a barrier. May be called again, at no cost.

        Raises WaitTimeoutError past the communicator's limit, PeerLostError where a rank has gone, GroupBrokenError
        where the group failed earlier.
        """
        if self._work is not None:
            self._communicator._finish(self, self._work)
        return self._result

    def __str__(self) -> str:
        ranks = "" if self.peer is None else f" {'to' if self.op == 'send' else 'from'} rank {self.peer}"
        return f"{self.op} #{self.seq}{ranks} of group {self._communicator.group!r} ({self.num_bytes:,} bytes)"


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

    def __init__(self, spec: GroupSpec) -> None:
        self.rank = spec.rank
        self.size = spec.size
        self.group = spec.name
        self.device = torch.device(spec.device)
        self.timeout_s = spec.timeout_s
        self.ledger = spec.ledger
        self._on_host = self.device.type == "cpu"
        self._broken: str | None = None
        self._closed = False
        self._num_open = 0
        self._num_sent: dict[tuple[str, int], int] = {}
        tick_s = min(0.5, spec.timeout_s / 8)
        self._board = WaitBoard(spec.store if spec.size > 1 else None, spec.rank, spec.size, tick_s)
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
        handle = self._begin("all_reduce", x, x.nbytes)
        return self._run(handle, async_op, self._start_all_reduce if handle.num_bytes else None, x, op)

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
        self._check_tensor("all_gather", x)
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
        handle = self._begin("all_gather", output, output.nbytes)
        return self._run(handle, async_op, self._start_all_gather if handle.num_bytes else None, output, x, sizes)

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
        handle = self._begin("reduce_scatter", output, x.nbytes)
        return self._run(handle, async_op, self._start_reduce_scatter if handle.num_bytes else None, output, x, sizes)

    @overload
    def broadcast(self, x: torch.Tensor, root: int, *, async_op: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def broadcast(self, x: torch.Tensor, root: int, *, async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def broadcast(self, x: torch.Tensor, root: int, *, async_op: bool = False) -> torch.Tensor | Handle[torch.Tensor]:
        """Replaces `x`, of any shape, on every rank by the `x` of rank `root`. Returns `x`."""
        self._check_tensor("broadcast", x)
        self._check_rank("broadcast", "root", root)
        handle = self._begin("broadcast", x, x.nbytes)
        return self._run(handle, async_op, self._start_broadcast if handle.num_bytes else None, x, root)

    @overload
    def send(self, x: torch.Tensor, to: int, *, async_op: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def send(self, x: torch.Tensor, to: int, *, async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def send(self, x: torch.Tensor, to: int, *, async_op: bool = False) -> torch.Tensor | Handle[torch.Tensor]:
        """Hands `x` to rank `to`. Done when `x` may be changed, which may be before it has arrived. Returns `x`."""
        self._check_tensor("send", x)
        self._check_peer("send", "to", to)
        handle = self._begin("send", x, x.nbytes, to)
        return self._run(handle, async_op, self._start_send if handle.num_bytes else None, x, to)

    @overload
    def recv(self, x: torch.Tensor, source: int, *, async_op: Literal[False] = False) -> torch.Tensor: ...
    @overload
    def recv(self, x: torch.Tensor, source: int, *, async_op: Literal[True]) -> Handle[torch.Tensor]: ...
    def recv(self, x: torch.Tensor, source: int, *, async_op: bool = False) -> torch.Tensor | Handle[torch.Tensor]:
        """Fills `x` with the next tensor that rank `source` sends here, of the same shape and dtype. Returns `x`."""
        self._check_tensor("recv", x)
        self._check_peer("recv", "source", source)
        handle = self._begin("recv", x, x.nbytes, source)
        return self._run(handle, async_op, self._start_recv if handle.num_bytes else None, x, source)

    @overload
    def barrier(self, *, async_op: Literal[False] = False) -> None: ...
    @overload
    def barrier(self, *, async_op: Literal[True]) -> Handle[None]: ...
    def barrier(self, *, async_op: bool = False) -> Handle[None] | None:
        """Done, for the calling thread too, when every rank has made this call."""
        self._check_usable("barrier")
        handle = self._begin("barrier", None, 0)
        return self._run(handle, async_op, self._start_barrier)

    def abort(self) -> None:
        """Fails every pending operation of the group, on this rank and, through closed connections, on the others."""
        if self._broken is None and not self._closed:
            self._broken = f"it was aborted on rank {self.rank}"
            self._abort()

    def close(self) -> None:
        """Releases connections and threads. Operations still under way are aborted. May be called again."""
        if self._closed:
            return
        if self._num_open:
            self.abort()
        self._closed = True
        self._board.close()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

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
        if self._broken is not None:
            raise GroupBrokenError(f"{op} in group {self.group!r} cannot run: {self._broken}")

    def _check_tensor(self, op: str, x: torch.Tensor) -> None:
        if self._closed or self._broken is not None:
            self._check_usable(op)
        if not (x.is_cpu if self._on_host else x.device.type == self.device.type):
            raise CommError(
                f"{op} in group {self.group!r}: the tensor is on {x.device}, but the group was made for {self.device}"
            )
        if x.dtype not in DTYPES:
            allowed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in DTYPES))
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

    def _begin(self, op: str, result: Result, num_bytes: int, peer: int | None = None) -> Handle[Result]:
        if peer is None:
            seq = self._board.num_started = self._board.num_started + 1
        else:
            seq = self._num_sent[op, peer] = self._num_sent.get((op, peer), 0) + 1
        self._num_open += 1
        return Handle(self, result, op, seq, peer, num_bytes)

    def _run(
        self, handle: Handle[Result], async_op: bool, start: Callable[..., Work] | None, *arguments: object
    ) -> Result | Handle[Result]:
        """Starts an operation; `start` is None where there is nothing to move, which every rank knows alike."""
        if start is not None:
            try:
                handle._work = start(*arguments)
            except (RuntimeError, ConnectionError) as error:
                self._fail(handle, error)
        if not async_op:
            return handle.wait()
        handle.starting_s = self.ledger.clock_s() - handle.started_s
        return handle

    def _finish(self, handle: Handle[Result], work: Work) -> None:
        if self._broken is not None or self._closed:
            self._check_usable(str(handle))
        clock_s = self.ledger.clock_s
        # A blocking call is exposed from its start; an asynchronous one while it started, and from here on.
        blocked_from_s = handle.started_s if handle.starting_s is None else clock_s() - handle.starting_s
        self._board.waiting = handle
        try:
            if not work.wait(self.timeout_s):
                self._give_up(handle)
        except (RuntimeError, ConnectionError) as error:
            self._fail(handle, error)
        finally:
            self._board.waiting = None
        handle._work = None
        self._num_open -= 1
        self.ledger.record(
            handle.seq,
            self.group,
            handle.op,
            handle.num_bytes,
            handle.started_s,
            clock_s() - blocked_from_s,
        )

    def _fail(self, handle: Handle[Result], error: Exception) -> NoReturn:
        if self._broken is not None:
            raise GroupBrokenError(f"{handle} on rank {self.rank} ended early: {self._broken}") from error
        if isinstance(error, ConnectionError):
            who = f"rank {handle.peer}" if handle.peer is not None else "a rank of the group"
            self._break(f"the connection to {who} was lost in {handle}")
            raise PeerLostError(
                f"{handle} on rank {self.rank}: the connection to {who} was lost ({error}). It has most likely died or "
                "given up: its own error is the cause, this is a symptom",
                handle.peer,
            ) from error
        self._break(f"{handle} failed")
        raise CommError(f"{handle} failed on rank {self.rank}: {error}") from error

    def _give_up(self, handle: Handle[Result]) -> NoReturn:
        statuses = self._board.read_others()
        others = [handle.peer] if handle.peer is not None else [rank for rank in range(self.size) if rank != self.rank]
        missing: list[int] = []
        notes: list[str] = []
        for rank in others:
            status = statuses.get(rank)
            arrived = handle.peer is None and status is not None and status.num_started >= handle.seq
            if not arrived:
                missing.append(rank)
            notes.append(f"rank {rank} {_describe(handle, status, arrived)}")
        what = ", ".join(f"rank {rank}" for rank in missing) or "no rank: all have started it"
        self._break(f"{handle} waited longer than {self.timeout_s:g} s")
        raise WaitTimeoutError(
            f"{handle} on rank {self.rank} waited longer than {self.timeout_s:g} s; not arrived: {what} "
            f"({'; '.join(notes)}). Look at what is named first; if it is only slow, raise the limit on waiting",
            missing,
        )

    def _break(self, why: str) -> None:
        """Closes the connections, so that ranks waiting for this one or for each other learn of the failure at once."""
        self._broken = why
        self._abort()


def _describe(handle: Handle[Result], status: RankStatus | None, arrived: bool) -> str:
    if status is None:
        return "is not waiting in this group: busy, stuck or dead"
    if arrived and status.seq == handle.seq and status.peer is None and status.op != handle.op:
        return f"called {status.op} as #{status.seq}: the ranks do not make the same calls"
    return f"{'has started it, ' if arrived else 'is '}{status}"
