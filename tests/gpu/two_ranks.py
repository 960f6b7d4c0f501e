"""Two ranks as threads of this process, on one GPU, and a wait that only the GPU can end."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from phalanx.comm import GroupSpec, Ledger
from phalanx.comm.gpu import CudaGpu
from phalanx.comm.nccl import NcclCommunicator
from phalanx.comm.nccl_binding import NcclBinding

_SHARES_GPU = 23000  # from NCCL 2.30 on, ranks may share a GPU where they are told that they may
# Read by NCCL when it is first used in the process. Few blocks: all ranks' kernels must fit on the GPU at once.
_SETTINGS = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4", "NCCL_NVLS_ENABLE": "0"}
os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})

CYCLES_PER_S = 1.8e9  # about: of an H100


def run_two(binding: NcclBinding, function: Callable[[NcclCommunicator], object], timeout_s: float = 30.0) -> list[Any]:
    """What each rank returned, each on a compute stream of its own; the first error where one raised."""
    from cupy.cuda import nccl

    if nccl.get_version() < _SHARES_GPU and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, or NCCL 2.30 for two ranks on one; loaded is {binding.told}")
    store = HashStore()

    def one(rank: int) -> object:
        index = rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            spec = GroupSpec(rank, 2, "pair", f"cuda:{index}", timeout_s, store, ledger=Ledger())
            comm = NcclCommunicator(spec, binding, CudaGpu(index))
            try:
                return function(comm)
            finally:
                comm.close()

    with ThreadPoolExecutor(2) as pool:
        return [future.result() for future in [pool.submit(one, rank) for rank in range(2)]]


def spin(seconds: float) -> None:
    """A kernel on the current stream that takes about so long."""
    torch.cuda._sleep(int(seconds * CYCLES_PER_S))  # type: ignore[no-untyped-call]
