"""What this machine has: cores, memory, GPUs."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phalanx.engine.host_memory import host_memory
from phalanx.launcher.topology import cores_here

_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86-64 twice, then 64-bit Arm


class Gpu(NamedTuple):
    """name: as the driver says. memory_bytes: all of its memory."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """num_cores: physical ones that this process may use, or has the time of. memory_bytes: of the machine, or of the
    container it is held in. free_bytes: of it, to be had now. None where nothing says. bfloat16: whether the CPU
    multiplies bfloat16 by instructions of its own. gpus: those PyTorch can use.
    """

    num_cores: int
    memory_bytes: int | None
    free_bytes: int | None
    bfloat16: bool
    gpus: tuple[Gpu, ...] = ()


def this_machine() -> Machine:
    """Looks at this machine. Where it may have GPUs, torch is imported to see them; nothing is started on them."""
    memory = host_memory()
    return Machine(cores_here(), memory.total_bytes, memory.free_bytes, _has_bfloat16(), _gpus())


def _gpus() -> tuple[Gpu, ...]:
    if not _has_gpu_driver():  # importing torch would take more than a second to say the same
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple(Gpu(each.name, each.total_memory) for each in properties)


def _has_gpu_driver() -> bool:
    """Whether there is what PyTorch could use GPUs by: NVIDIA's library, or AMD's device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Path("/dev/kfd").exists()
    return True


def _has_bfloat16() -> bool:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system
        return False
    for line in lines:
        name, _, flags = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return not _BFLOAT16_FLAGS.isdisjoint(flags.split())
    return False
