"""What the ranks of `test_hierarchical.py` run: functions that the pool loads from this file."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator
from phalanx.comm.hierarchical import SHARED_BYTES, HierarchicalCommunicator

# Below, and above, what all carriers of a machine share; the latter no multiple of anything.
COUNTS = [7, SHARED_BYTES // 2 + 4099]


def rank_sums(comm: Communicator, store: Store, count: int, dtype: str, op: str) -> object:
    """How many elements are wrong."""
    ranks = torch.arange(comm.size).unsqueeze(1)
    values = (torch.arange(count) * (ranks + 2) + 3 * ranks) % 23
    expected = values.sum(0) if op == "sum" else values.amax(0)
    x = comm.all_reduce(values[comm.rank].to(getattr(torch, dtype)), op=cast(Any, op))
    return int((x != expected.to(x.dtype)).sum())


def rank_moves_much(comm: Communicator, store: Store, rows: list[int]) -> list[bool]:
    """Whether rows gathered, scattered and spread, in bytes that all carriers share, are those that they should be."""
    generator = torch.Generator().manual_seed(7)
    whole = torch.randint(-50, 50, (4, sum(rows), 4099), generator=generator, dtype=torch.int32)
    start, stop = sum(rows[: comm.rank]), sum(rows[: comm.rank + 1])
    gathered_rows = comm.all_gather(whole[0, start:stop].contiguous(), sizes=rows)
    scattered = comm.reduce_scatter(whole[comm.rank].clone(), sizes=rows)
    spread = [comm.broadcast(whole[comm.rank].clone(), root) for root in range(comm.size)]
    return [
        torch.equal(gathered_rows, whole[0]),
        torch.equal(scattered, whole.sum(0)[start:stop].int()),
        all(torch.equal(x, whole[root]) for root, x in enumerate(spread)),
    ]


def rank_sum_of_reals(comm: Communicator, store: Store, count: int, dtype: str) -> object:
    """The largest error of a sum, in steps of the dtype at what was added without signs; and a digest of its bits."""
    narrow: torch.dtype = getattr(torch, dtype)
    own = torch.randn(count, generator=torch.Generator().manual_seed(comm.rank)).to(narrow)
    exact = sum(
        torch.randn(count, generator=torch.Generator().manual_seed(rank)).to(narrow).double()
        for rank in range(comm.size)
    )
    assert isinstance(exact, torch.Tensor)
    parts = comm.all_gather(own.unsqueeze(0)).double().abs().sum(0)
    got = comm.all_reduce(own)
    error = (got.double() - exact).abs() / (parts * torch.finfo(narrow).eps)
    return float(error.max()), int(got.view(torch.int16).long().mul(torch.arange(1, count + 1)).sum())


def rank_many_under_way(comm: Communicator, store: Store, count: int) -> object:
    """Collectives and sends started in one order, waited for in another, a blocking one in between."""
    handles: list[Any] = [comm.all_reduce(torch.full((count,), float(number)), async_op=True) for number in range(1, 6)]
    peers = [rank for rank in range(comm.size) if rank != comm.rank]
    receiving = [comm.recv(torch.empty(50_000), peer, async_op=True) for peer in peers]
    total = comm.all_reduce(torch.tensor([float(comm.rank)]))
    sending = [comm.send(torch.full((50_000,), float(comm.rank)), peer, async_op=True) for peer in peers]
    sums = [set(handle.wait().tolist()) for handle in reversed(handles)]
    received = [set(handle.wait().tolist()) for handle in receiving]
    for handle in sending:
        handle.wait()
    return total.tolist(), [sorted(found) for found in sums], [sorted(found) for found in received]


def rank_entries(comm: Communicator, store: Store) -> object:
    comm.barrier()
    comm.all_reduce(torch.ones(1000))
    handle = comm.all_reduce(torch.ones(1000), async_op=True)
    time.sleep(0.2)  # what it takes itself does not grow with how late it is waited for
    handle.wait()
    *_, late = entries = comm.ledger.entries()
    assert 0 < late.took_us < late.total_us - 0.1e6
    assert all(0 < entry.took_us <= entry.total_us for entry in entries)
    return [(entry.op, entry.seq, entry.num_bytes, entry.group == comm.group) for entry in entries]


def rank_counts_sends(comm: Communicator, store: Store, count: int) -> object:
    """Bytes of each transfer that an all-reduce sends from this rank through the network."""
    assert isinstance(comm, HierarchicalCommunicator)
    sent: list[int] = []
    if (between := comm._between) is not None:
        swap = between.swap

        def watched(out: Mapping[int, torch.Tensor], *arguments: Any) -> None:
            sent.extend(x.nbytes for x in out.values() if x.numel())
            swap(out, *arguments)

        between.swap = watched  # type: ignore[assignment]
    try:
        comm.all_reduce(torch.ones(count, dtype=torch.bfloat16))
    finally:
        if between is not None:
            between.swap = swap
    return sent


def rank_is_late(comm: Communicator, store: Store, key: str, late: int) -> object:
    comm.barrier()
    if comm.rank == late:
        while store.add(key, 0) < comm.size - 1:
            time.sleep(0.02)
        return None
    try:
        return comm.all_reduce(torch.ones(1, 576)).tolist()
    finally:
        store.add(key, 1)


def rank_dies(comm: Communicator, store: Store, victim: int) -> object:
    comm.barrier()
    if comm.rank == victim:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(torch.ones(64))
    return None


def rank_chosen(comm: Communicator, store: Store) -> object:
    comm.barrier()
    return comm.backend, comm.reason
