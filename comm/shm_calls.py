"""What the ranks of a `shm` group agree about, call by call; and the calls that the native library makes whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm.communicator import DTYPES, ReduceOp
from phalanx.comm.group import GroupSpec
from phalanx.comm.shm_segment import NUM_SMALL, Segment

if TYPE_CHECKING:
    from phalanx import _native

# Rounds of small collectives that a rank may have published without having read the others' slots of the first. When a
# rank publishes round k, the others have published k - WINDOW, so they have read all up to k - 2 * WINDOW.
WINDOW = NUM_SMALL // 2

OPS = ("", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "send")
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, BARRIER, SEND = range(1, 7)
NARROW = (torch.bfloat16, torch.float16)
NORMED = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = sorted(DTYPES, key=str)  # the native library counts them in this order too
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

# Ends of a native call, `End` in `csrc/waiter.hpp`.
_LATE, _ABORTED, _LEFT, _ENDED, _UNLIKE = range(1, 6)

Failure = tuple[int, int, int, int]


def signature(op: int, x: torch.Tensor, root: int = 0) -> int:
    """What the ranks must agree about, in 63 bits."""
    return ((x.nbytes << 16 | root) << 3 | _DTYPE_CODES[x.dtype]) << 3 | op


def told(header: int) -> str:
    """What a signature says."""
    op, dtype = OPS[header & 7], str(_DTYPES[header >> 3 & 7]).removeprefix("torch.")
    root, num_bytes = header >> 6 & 0xFFFF, header >> 22
    if op == "barrier":
        return op
    what = f"{num_bytes:,} bytes of {dtype}"
    return what if op == "send" else f"{op} of {what}" + (f" from rank {root}" if op == "broadcast" else "")


def core_for_each(spec: GroupSpec, store: Store) -> bool:
    """Whether the ranks of a group may run on as many cores as they are. Asked by all of them, after they have met."""
    store.set(f"cores/{spec.rank}", json.dumps(sorted(os.sched_getaffinity(0))))
    cores = {core for rank in range(spec.size) for core in json.loads(store.get(f"cores/{rank}"))}
    return len(cores) >= spec.size


class NativeCalls:
    """A rank's blocking calls, each made whole by the native library, which waits and copies without the interpreter's
    lock. Each returns None, or how it failed, for `as_error`. They leave the group's memory as the steps of
    `ShmCommunicator` would, so that ranks with and without the library get along, and one rank may do both in turn.
    """

    def __init__(
        self, library: ModuleType, segment: Segment, rank: int, pidfds: list[int], may_spin: bool, timeout_s: float
    ) -> None:
        self._group: _native.Group = library.Group(
            segment, segment.address, segment.layout(), rank, pidfds, may_spin, WINDOW
        )
        self._size = segment.size
        self._timeout_s = timeout_s

    def all_reduce(self, x: torch.Tensor, op: ReduceOp) -> Failure | None:
        code = _DTYPE_CODES[x.dtype]
        return self._group.all_reduce(x.data_ptr(), x.nbytes, code, op == "max", self._timeout_s)

    def all_reduce_rms_norm(
        self, x: torch.Tensor, sums: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> Failure | None:
        """Puts the norm into `x` and the sum with the residual into `sums`."""
        width = x.shape[-1]
        return self._group.all_reduce_rms_norm(
            x.data_ptr(),
            sums.data_ptr(),
            residual.data_ptr(),
            weight.data_ptr(),
            eps,
            x.numel() // width,
            width,
            _DTYPE_CODES[x.dtype],
            self._timeout_s,
        )

    def all_gather(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Failure | None:
        row_bytes = output.nbytes // output.shape[0]
        counts = [rows * row_bytes for rows in sizes or [x.shape[0]] * self._size]
        code = _DTYPE_CODES[x.dtype]
        return self._group.all_gather(output.data_ptr(), x.data_ptr(), counts, code, self._timeout_s)

    def reduce_scatter(self, output: torch.Tensor, x: torch.Tensor, sizes: Sequence[int] | None) -> Failure | None:
        row = x.numel() // x.shape[0]
        counts = [rows * row for rows in sizes or [output.shape[0]] * self._size]
        code = _DTYPE_CODES[x.dtype]
        return self._group.reduce_scatter(output.data_ptr(), x.data_ptr(), counts, code, self._timeout_s)

    def broadcast(self, x: torch.Tensor, root: int) -> Failure | None:
        return self._group.broadcast(x.data_ptr(), x.nbytes, _DTYPE_CODES[x.dtype], root, self._timeout_s)

    def barrier(self) -> Failure | None:
        return self._group.barrier(self._timeout_s)

    def send(self, x: torch.Tensor, to: int) -> Failure | None:
        return self._group.send(x.data_ptr(), x.nbytes, _DTYPE_CODES[x.dtype], to, self._timeout_s)

    def recv(self, x: torch.Tensor, source: int) -> Failure | None:
        return self._group.recv(x.data_ptr(), x.nbytes, _DTYPE_CODES[x.dtype], source, self._timeout_s)


def as_error(failure: Failure) -> Exception | None:
    """What the same failure raises without the library; None where the call was late."""
    end, rank, header, expected = failure
    if end == _LATE:
        return None
    if end == _ABORTED:
        return ConnectionError(f"rank {rank} ended the group")
    if end == _UNLIKE:
        return unlike_error(rank, header, expected)
    assert end in (_LEFT, _ENDED)
    return ConnectionError(f"rank {rank} has {'closed its end' if end == _LEFT else 'ended'}")


def unlike_error(rank: int, header: int, expected: int) -> RuntimeError:
    if expected & 7 == SEND:
        return RuntimeError(f"rank {rank} sent {told(header)}, this rank expects {told(expected)}")
    return RuntimeError(
        f"rank {rank} called {told(header)}, this rank {told(expected)}: the ranks do not make the same calls"
    )
