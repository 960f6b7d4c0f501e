"""What is asked of a binding of NCCL: the calls of its C interface that are used here, on raw pointers.

`nccl_cupy.py` gives them by CuPy. Another binding (nccl4py, ctypes) is another file of that size.
"""

from __future__ import annotations

from typing import Protocol

import torch

# ncclDataType_t and ncclRedOp_t, nccl.h
DATA_TYPES = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.int64: 4,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}
REDUCTIONS = {"sum": 0, "max": 2}


class NcclComm(Protocol):
    """One rank's end of an NCCL communicator. source, target: addresses in the GPU's memory. count: elements.

    The calls enqueue on `stream`, a raw handle, and raise RuntimeError. Those between `group_start` and `group_end` of
    the binding are one operation.
    """

    def all_reduce(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None: ...

    def reduce(self, source: int, target: int, count: int, dtype: int, op: int, root: int, stream: int) -> None: ...

    def all_gather(self, source: int, target: int, count: int, dtype: int, stream: int) -> None:
        """count: of one rank."""
        ...

    def reduce_scatter(self, source: int, target: int, count: int, dtype: int, op: int, stream: int) -> None:
        """count: of one rank."""
        ...

    def broadcast(self, source: int, target: int, count: int, dtype: int, root: int, stream: int) -> None: ...

    def send(self, source: int, count: int, dtype: int, peer: int, stream: int) -> None: ...

    def recv(self, target: int, count: int, dtype: int, peer: int, stream: int) -> None: ...

    def split(self, color: int, key: int) -> NcclComm | None:
        """Blocks until every rank has called. color: of this rank's new communicator, -1 for none; key: its order."""
        ...

    def check(self) -> None:
        """Raises RuntimeError for an error that came up behind the calls."""
        ...

    def abort(self) -> None:
        """Ends what is under way; from any thread. Nothing else may be called afterwards."""
        ...

    def destroy(self) -> None:
        """Releases it. Nothing may be under way."""
        ...


class NcclBinding(Protocol):
    """A binding that is loaded."""

    told: str
    """What it is: the NCCL that is loaded, its version, and by what."""

    def unique_id(self) -> bytes:
        """Names one communicator that is yet to be made."""
        ...

    def join(self, size: int, unique_id: bytes, rank: int) -> NcclComm:
        """Blocks until all ranks have called it, on the current device."""
        ...

    def group_start(self) -> None: ...

    def group_end(self) -> None: ...
