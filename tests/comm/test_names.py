"""Operations as torch's profiler shows them. Functions named `rank_*` run on each rank of the pool."""

from __future__ import annotations

from typing import Any

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator
from phalanx.comm.names import profiled


def rank_profiled(comm: Communicator, store: Store) -> list[str]:
    assert not profiled()
    x = torch.ones(2, 8)
    comm.all_reduce(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        comm.all_reduce(x)
        comm.fused_all_reduce_rms_norm(x, torch.ones(2, 8), torch.ones(8), 1e-5)
        handle = comm.all_gather(x, async_op=True)
        handle.wait()
        comm.barrier()
    assert not profiled()
    return [event.name for event in profile.events()]


def test_the_profiler_sees_operations_by_the_ledgers_names(any_pool: Any) -> None:
    for names in any_pool.run(rank_profiled, 2, fresh=True):
        for op in ("all_reduce", "fused_all_reduce_rms_norm", "all_gather", "barrier"):
            assert names.count(op) == 1, (op, names)
        assert names.count("start all_gather") == 1
