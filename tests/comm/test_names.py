"""Operations as torch's profiler shows them. Functions named `rank_*` run on each rank of the pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import Store

from phalanx.comm import Communicator
from phalanx.kernels import names
from phalanx.kernels.names import in_range, profiled


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
    for seen in any_pool.run(rank_profiled, 2, fresh=True):
        for op in ("all_reduce", "fused_all_reduce_rms_norm", "all_gather", "barrier"):
            assert seen.count(op) == 1, (op, seen)
        assert seen.count("start all_gather") == 1


def test_under_nsight_an_operation_is_a_range_of_its_name_however_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(names, "_UNDER_NSIGHT", True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", calls.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: calls.append("pop"))
    assert in_range("all_reduce", "#7 of stage0", lambda x: x + 1)(2) == 3
    with pytest.raises(ZeroDivisionError):
        in_range("barrier", "#8 of stage0", lambda: 1 // 0)()
    assert calls == ["all_reduce #7 of stage0", "pop", "barrier #8 of stage0", "pop"]
