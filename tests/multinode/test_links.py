"""What ranks notice of their links: one that is cut and restored, cut for good, or throttled while they use it.

Functions named `rank_*` run on each rank of the pool.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tests.comm.rank_pool import RankPool
from tests.multinode.netlab import Net
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator

APART = [0, 2]  # a rank on alpha, where the store is, and one on beta
CUT_S = 1.5


def reduced(comm: Communicator, number: int, size: int) -> torch.Tensor:
    """An all-reduce of `size` numbers, unlike on every rank and in every round, checked on every element."""
    own = torch.arange(size, dtype=torch.float32) % 1009 + number
    total = comm.all_reduce(own * (comm.rank + 1))
    assert torch.equal(total, (torch.arange(size, dtype=torch.float32) % 1009 + number) * sum(range(1, comm.size + 1)))
    return total


def rank_reduces_until(comm: Communicator, store: Store, started: str, stop: str, size: int) -> list[float]:
    """Seconds of each all-reduce, over and over until the file `stop` is there; `started` is written after five."""
    times_s: list[float] = []
    while True:
        begun = time.monotonic()
        reduced(comm, len(times_s), size)
        times_s.append(time.monotonic() - begun)
        if len(times_s) == 5 and comm.rank == 0:
            Path(started).touch()
        if int(comm.broadcast(torch.tensor([int(Path(stop).exists())]), 0)):
            return times_s


def meanwhile(do: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=do)
    thread.start()
    return thread


def wait_for(file: Path, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.01)


def test_a_link_cut_and_restored_within_the_limit_delays_and_no_more(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    started, stop = tmp_path / "started", tmp_path / "stop"

    def cut_and_restore() -> None:
        wait_for(started)
        net.cut("beta")
        time.sleep(CUT_S)
        net.restore("beta")
        time.sleep(0.5)
        stop.touch()

    thread = meanwhile(cut_and_restore)
    runs = host_pool.run(
        rank_reduces_until,
        2,
        workers=APART,
        fresh=True,
        timeout_s=25.0,
        started=str(started),
        stop=str(stop),
        size=100_000,
    )
    thread.join()
    for times_s in runs:
        assert sum(each > 0.8 * CUT_S for each in times_s) == 1  # the operation that was under way, and no other


def rank_is_cut_off(comm: Communicator, store: Store, started: str) -> object:
    comm.barrier()
    for number in range(3):
        reduced(comm, number, 1000)
    if comm.rank == 0:
        Path(started).touch()
    begun = time.monotonic()
    try:
        for number in range(1_000_000):
            reduced(comm, number, 50_000)
    except Exception as error:
        return {
            "type": type(error).__name__,
            "message": str(error),
            "missing": list(getattr(error, "missing_ranks", ())),
            "num_done": comm._board.num_started,
            "after_s": time.monotonic() - begun,
        }
    return None


def test_a_link_cut_for_good_ends_the_wait_at_its_limit_and_names_who_did_not_come(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    cut_at: list[float] = []

    def cut() -> None:
        wait_for(started)
        net.cut("gamma")
        cut_at.append(time.monotonic())

    thread = meanwhile(cut)
    errors: list[Any] = host_pool.run(
        rank_is_cut_off, 3, workers=[0, 2, 3], fresh=True, timeout_s=3.0, started=str(started)
    )
    ended_s = time.monotonic() - cut_at[0]
    thread.join()
    print(errors, ended_s)
    raise AssertionError


def test_a_link_throttled_to_a_tenth_makes_the_run_slower_and_nothing_else(
    net: Net, host_pool: RankPool, tmp_path: Path
) -> None:
    started, stop = tmp_path / "started", tmp_path / "stop"
    net.set_rate(200.0)
    
    def throttle() -> None:
        wait_for(started)
        net.set_rate(20.0)
        time.sleep(2.0)
        stop.touch()

    thread = meanwhile(throttle)
    runs = host_pool.run(
        rank_reduces_until,
        2,
        workers=APART,
        fresh=True,
        started=str(started),
        stop=str(stop),
        size=125_000,
    )
    thread.join()
    for times_s in runs:
        assert len(times_s) > 6
        assert median(times_s[-2:]) > 4 * median(times_s[:5])
