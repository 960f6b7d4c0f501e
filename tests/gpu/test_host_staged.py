"""The host-staged channel on a real GPU: two processes' worth of ranks as threads that share it, over gloo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.gpu.two_ranks import spin
from torch._C._distributed_c10d import HashStore

from phalanx.comm import GroupSpec
from phalanx.comm.host_staged import StagedCommunicator


@pytest.mark.parametrize("num", [1, 1000, 4 << 20, (10 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_what_a_kernel_makes_arrives_for_a_kernel(num: int, dtype: torch.dtype) -> None:
    store = HashStore()
    values = torch.randn(num, device="cuda").to(dtype)
    torch.cuda.synchronize()

    def one(rank: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            spec = GroupSpec(rank, 2, "border", "cuda", 30.0, store, "127.0.0.1")
            with StagedCommunicator(spec) as comm:
                x = torch.zeros(num, device="cuda").to(dtype)
                for _ in range(3):
                    x.zero_()
                    if rank == 0:
                        spin(0.01)
                        x.copy_(values)
                        comm.send(x, 1, async_op=True).wait()
                        x.zero_()  # must not overtake the copies
                    else:
                        comm.recv(x, 0, async_op=True).wait()
                        assert torch.equal(x.view(torch.uint8), values.view(torch.uint8))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(2)))
