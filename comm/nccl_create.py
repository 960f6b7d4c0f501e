"""Which binding of NCCL a group uses: all ranks the same."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch._C._distributed_c10d import PrefixStore

from phalanx.comm.communicator import Communicator
from phalanx.comm.gpu import CudaGpu
from phalanx.comm.group import GroupSpec
from phalanx.comm.nccl import NcclCommunicator
from phalanx.comm.nccl_cupy import find_cupy
from phalanx.comm.rendezvous import interface_of, meet
from phalanx.comm.torch_backend import TorchNcclCommunicator
from phalanx.errors import CommError


def create_nccl(spec: GroupSpec) -> Communicator:
    """By CuPy where every rank has it, else by torch.distributed: the reason says which, and why."""
    index = torch.device(spec.device).index
    index = torch.cuda.current_device() if index is None else index
    found = find_cupy()
    if spec.store is None:
        lacking = "" if found.binding else found.told
    else:
        _name_interface(spec.address)
        lacking = _agree(spec, "" if found.binding else found.told)
    if found.binding is None or lacking:
        if spec.store is None:
            raise CommError(f"group {spec.name!r} of one: {lacking}; use the backend single")
        return TorchNcclCommunicator(replace(spec, reason=f"{spec.reason}; by torch.distributed, since {lacking}"))
    spec = replace(spec, device=f"cuda:{index}")
    with torch.cuda.device(index):
        return NcclCommunicator(spec, found.binding, CudaGpu(index))


def _agree(spec: GroupSpec, lacking: str) -> str:
    """Why not all ranks can use the binding; empty where they can. All get the same answer."""
    assert spec.store is not None
    store = PrefixStore("binding", spec.store)
    store.set(f"lacking/{spec.rank}", lacking)
    meet(store, spec.name, spec.rank, spec.size, spec.timeout_s)
    told = [store.get(f"lacking/{rank}").decode() for rank in range(spec.size)]
    return next((f"on rank {rank} {text}" for rank, text in enumerate(told) if text), "")


def _name_interface(address: str | None) -> None:
    """NCCL takes the interface from a variable alone, read once in a process. A user's own is left as it is."""
    name = interface_of(address) if address else None
    if name is not None:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")
