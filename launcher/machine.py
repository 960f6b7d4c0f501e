"""What this machine has: cores, memory, GPUs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phalanx.engine.host_memory import host_memory

_CPU_INFO = Path("/proc/cpuinfo")
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86-64 twice, then 64-bit Arm


class Gpu(NamedTuple):
    """name: as the driver says. memory_bytes: all of its memory."""

    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """num_cores: that this process may use. memory_bytes: of the machine, or of the container it is held in.
    free_bytes: of it, to be had now. None where nothing says. bfloat16: whether the CPU multiplies bfloat16 by
    instructions of its own. gpus: those PyTorch can use.
    """

    num_cores: int
    memory_bytes: int | None
    free_bytes: int | None
    bfloat16: bool
    gpus: tuple[Gpu, ...] = ()


def this_machine() -> Machine:
    """Looks at this machine. Imports torch to see the GPUs, and starts nothing on them."""
    import torch

    gpus: tuple[Gpu, ...] = ()
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = tuple(Gpu(each.name, each.total_memory) for each in properties)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = host_memory()
    return Machine(cores, memory.total_bytes, memory.free_bytes, _has_bfloat16(), gpus)


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
