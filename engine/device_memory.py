"""What the memory that a rank computes in holds, as its device tells it: the seam under all accounting of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from phalanx.engine.host_memory import host_memory
from phalanx.errors import PhalanxError

if TYPE_CHECKING:
    import torch


class Reading(NamedTuple):
    """Of one moment. total_bytes: the device's. free_bytes: in nobody's hands. allocated_bytes: in tensors of this
    process; peak_bytes: the most of that since the last `reset_peak`. reserved_bytes: held by PyTorch for tensors, with
    what is in none now.
    """

    total_bytes: int
    free_bytes: int
    allocated_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0

    @property
    def outside_bytes(self) -> int:
        """Taken, but not by PyTorch's allocator: contexts, communicators, loaded kernels, graphs, other processes."""
        return self.total_bytes - self.free_bytes - self.reserved_bytes

    @property
    def unused_bytes(self) -> int:
        """Free, or held by PyTorch without need."""
        return self.free_bytes + self.reserved_bytes - self.allocated_bytes


class MemoryMeter(Protocol):
    """by_part: whether the device tells what is in tensors and what beside."""

    @property
    def by_part(self) -> bool: ...

    def read(self) -> Reading: ...

    def reset_peak(self) -> None:
        """From now on `peak_bytes` begins at what is allocated."""
        ...

    def give_back(self) -> None:
        """What PyTorch holds without need goes back to the device, once that has done what it was given."""
        ...


class GpuMeter:
    """`MemoryMeter` of a GPU. Reading it asks the driver, which takes microseconds, and waits for nothing."""

    by_part = True

    def __init__(self, device: torch.device) -> None:
        from torch import cuda

        self._cuda = cuda
        self._device = device

    def read(self) -> Reading:
        cuda, device = self._cuda, self._device
        free_bytes, total_bytes = cuda.mem_get_info(device)
        allocated_bytes, peak_bytes = cuda.memory_allocated(device), cuda.max_memory_allocated(device)
        return Reading(total_bytes, free_bytes, allocated_bytes, peak_bytes, cuda.memory_reserved(device))

    def reset_peak(self) -> None:
        self._cuda.reset_peak_memory_stats(self._device)

    def give_back(self) -> None:
        self._cuda.synchronize(self._device)
        self._cuda.empty_cache()


class HostMeter:
    """`MemoryMeter` of this machine or container, which tells no parts: pages are given as they are written."""

    by_part = False

    def read(self) -> Reading:
        """Raises PhalanxError where this system does not tell."""
        total_bytes, free_bytes = host_memory()
        if total_bytes is None or free_bytes is None:
            raise PhalanxError(
                "this system does not say how much memory is free, so the KV cache cannot be sized by it; give "
                "engine.kv_cache a size, such as 1GiB"
            )
        return Reading(total_bytes, free_bytes)

    def reset_peak(self) -> None:
        return

    def give_back(self) -> None:
        return


def memory_meter(device: torch.device) -> MemoryMeter:
    return GpuMeter(device) if device.type == "cuda" else HostMeter()
