"""What the ranks of a `shm` group agree about, call by call."""

from __future__ import annotations

import torch

from phalanx.comm.communicator import DTYPES
from phalanx.comm.shm_segment import NUM_BLOCKS

# Rounds that a rank may have published without having read the others' slots of the first. A rank waits for the others
# before it comes back to a block of its arena, the rounds there being NUM_BLOCKS before or more: so that it waits for
# none that they could not publish without it, this is less.
WINDOW = NUM_BLOCKS // 2

OPS = ("", "all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier", "send")
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, BARRIER, SEND = range(1, 7)
_DTYPES = sorted(DTYPES, key=str)  # the native library counts them in this order too
DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def signature(op: int, x: torch.Tensor, root: int = 0) -> int:
    """What the ranks must agree about, in 63 bits."""
    return ((x.nbytes << 16 | root) << 3 | DTYPE_CODES[x.dtype]) << 3 | op


def told(header: int) -> str:
    """What a signature says."""
    op, dtype = OPS[header & 7], str(_DTYPES[header >> 3 & 7]).removeprefix("torch.")
    root, num_bytes = header >> 6 & 0xFFFF, header >> 22
    if op == "barrier":
        return op
    what = f"{num_bytes:,} bytes of {dtype}"
    return what if op == "send" else f"{op} of {what}" + (f" from rank {root}" if op == "broadcast" else "")


def unlike_error(rank: int, header: int, expected: int) -> RuntimeError:
    if expected & 7 == SEND:
        return RuntimeError(f"rank {rank} sent {told(header)}, this rank expects {told(expected)}")
    return RuntimeError(
        f"rank {rank} called {told(header)}, this rank {told(expected)}: the ranks do not make the same calls"
    )
