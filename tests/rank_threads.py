"""Ranks as threads of this process, their transfers real: a layout in milliseconds instead of a start of processes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

from torch._C._distributed_c10d import HashStore

from phalanx.comm import Communicator, create_communicator

Result = TypeVar("Result")


Join = Callable[[str, int, int], Communicator]
"""Joins the group of this name as this rank of so many; it is left when the rank's function returns."""


def run_ranks(
    num_ranks: int, function: Callable[[int, Join], Result], timeout_s: float = 20.0, backend: str = "auto"
) -> list[Result]:
    """What `function(rank, join)` returned on each rank; raises what the first rank to fail raised."""
    store = HashStore()

    def run(rank: int) -> Result:
        comms: list[Communicator] = []

        def join(group: str, group_rank: int, size: int) -> Communicator:
            comm = create_communicator(
                backend, rank=group_rank, size=size, rendezvous=store, group=group, timeout_s=timeout_s
            )
            comms.append(comm)
            return comm

        try:
            return function(rank, join)
        finally:
            for comm in comms:
                comm.close()

    with ThreadPoolExecutor(num_ranks) as pool:
        futures = [pool.submit(run, rank) for rank in range(num_ranks)]
        for done in wait(futures, return_when=FIRST_EXCEPTION).done:
            done.result()
        return [future.result() for future in futures]
