"""What the ranks in the hosts run: functions that the pool loads from this file, which needs nothing but Phalanx."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator, create_communicator, local_address
from phalanx.errors import CommError


def rank_choice(comm: Communicator, store: Store, towards: str) -> list[str]:
    """Backend, its reason, the address towards the host `towards`, and that of the default route."""
    comm.barrier()
    return [comm.backend, comm.reason, local_address(towards), local_address()]


def rank_meets_in_a_file(comm: Communicator, store: Store, path: str, interface: str) -> list[float]:
    with create_communicator(
        rank=comm.rank, size=comm.size, rendezvous=f"file://{path}", interface=interface, timeout_s=3.0
    ) as met:
        total: list[float] = met.all_reduce(torch.ones(3)).tolist()
        return total


def rank_is_cut_off(comm: Communicator, store: Store, path: str, interface: str, limit_s: float) -> list[object]:
    """The error of a group whose ranks cannot reach each other, and after how many seconds it came."""
    begun = time.monotonic()
    try:
        create_communicator(
            rank=comm.rank, size=comm.size, rendezvous=f"file://{path}", interface=interface, timeout_s=limit_s
        )
    except CommError as error:
        return [str(error), time.monotonic() - begun]
    raise AssertionError("they reach each other")


def rank_reduces_until(comm: Communicator, store: Store, started: str, stop: str, count: int) -> list[float]:
    """Seconds of each all-reduce, over and over until rank 0 sees the file `stop`; `started` is written after five."""
    times_s: list[float] = []
    told = False
    while not told:
        begun = time.monotonic()
        told = _reduce(comm, len(times_s), count, tell=comm.rank == 0 and Path(stop).exists())
        times_s.append(time.monotonic() - begun)
        if len(times_s) == 5:
            Path(started).touch()
    return times_s


def rank_reduces_until_it_fails(comm: Communicator, store: Store, started: str, count: int) -> dict[str, object]:
    """The error of an all-reduce, its number and how long it took; `started` is written after three."""
    number = 0
    while True:
        number += 1
        begun = time.monotonic()
        try:
            _reduce(comm, number, count)
        except CommError as error:
            return {
                "type": type(error).__name__,
                "message": str(error),
                "missing": list(getattr(error, "missing_ranks", ())),
                "number": number,
                "after_s": time.monotonic() - begun,
            }
        if number == 3:
            Path(started).touch()


def _reduce(comm: Communicator, number: int, count: int, *, tell: bool = False) -> bool:
    """An all-reduce, unlike on every rank and in every round, with every element checked; whether any rank told."""
    own = torch.arange(count, dtype=torch.float32) % 1009 + number
    total = comm.all_reduce(torch.cat([own * (comm.rank + 1), torch.tensor([float(tell)])]))
    assert torch.equal(total[:-1], own * sum(range(1, comm.size + 1)))
    return bool(total[-1])
