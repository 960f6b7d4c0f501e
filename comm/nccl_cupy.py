"""NCCL by CuPy's binding. Tried with CuPy 14.2 and NCCL 2.28 to 2.32."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

from phalanx.comm.nccl_binding import NcclBinding, NcclComm

_OLDEST = 21801  # commSplit came with 2.18.1


class Found(NamedTuple):
    """The binding, or None, and what there is to say of it: what is loaded, or why not and what to do."""

    binding: NcclBinding | None
    told: str


@cache
def find_cupy() -> Found:
    """CuPy's binding of NCCL, if it can be loaded here. The first call takes a second, for importing CuPy."""
    if find_spec("cupy") is None:
        return Found(None, "CuPy is not installed; `pip install phalanx[gpu]` brings it")
    # torch first: both then use the NCCL that torch has loaded, since a library of that name is loaded once.
    import torch  # noqa: F401

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns of an NCCL it cannot load; we say so ourselves
            import cupy
            from cupy.cuda import nccl
    except ImportError as error:
        return Found(None, f"CuPy cannot be imported ({str(error).strip().splitlines()[0]})")
    if not nccl.available:
        return Found(
            None, f"CuPy {cupy.__version__} finds no NCCL; install the nvidia-nccl package of its CUDA version"
        )
    version = int(nccl.get_version())
    built = spelled(nccl.get_build_version())
    told = f"NCCL {spelled(version)} through CuPy {cupy.__version__}, built for {built}"
    if version < _OLDEST:
        return Found(None, f"{told}: it needs NCCL {spelled(_OLDEST)} or newer")
    return Found(CupyBinding(nccl, told), told)


def spelled(version: int) -> str:
    """22809 as 2.28.9. NCCL_VERSION_CODE, nccl.h, from 2.9 on."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


class CupyBinding:
    """nccl: the module `cupy.cuda.nccl`."""

    def __init__(self, nccl: Any, told: str) -> None:
        self._nccl = nccl
        self.told = told

    def unique_id(self) -> bytes:
        return bytes(self._nccl.get_unique_id())

    def join(self, size: int, unique_id: bytes, rank: int) -> NcclComm:
        return _CupyComm(self._nccl.NcclCommunicator(size, unique_id, rank))

    def group_start(self) -> None:
        self._nccl.groupStart()

    def group_end(self) -> None:
        self._nccl.groupEnd()


class _CupyComm:
    """Its calls have the arguments of `NcclComm` in the same order: the bound methods themselves are handed on."""

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.all_reduce = comm.allReduce
        self.reduce = comm.reduce
        self.all_gather = comm.allGather
        self.reduce_scatter = comm.reduceScatter
        self.broadcast = comm.broadcast
        self.send = comm.send
        self.recv = comm.recv
        self.check = comm.check_async_error
        self.abort = comm.abort
        self.destroy = comm.destroy

    def split(self, color: int, key: int) -> NcclComm | None:
        part = self._comm.commSplit(color, key)
        return None if part is None else _CupyComm(part)
