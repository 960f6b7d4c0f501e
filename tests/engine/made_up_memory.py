"""Memory of a GPU that is none: it holds what it is told to, and runs out."""

from __future__ import annotations

import torch

from phalanx.engine.device_memory import Reading

MIB = 2**20


class MadeUpMemory:
    """`MemoryMeter`. Sizes in MiB. outside: taken beside PyTorch's allocator. cached: held by it without need."""

    by_part = True

    def __init__(self, total: int, outside: int = 0) -> None:
        self.total = total
        self.outside = outside
        self.allocated = self.peak = self.cached = 0

    def take(self, size: int) -> None:
        """Of PyTorch's allocator, which raises its own error where there is no room."""
        if self.outside + self.allocated + size > self.total:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.00 MiB. GPU 0 has ...")
        self.cached = max(0, self.cached - size)
        self.allocated += size
        self.peak = max(self.peak, self.allocated)

    def drop(self, size: int) -> None:
        self.allocated -= size
        self.cached += size

    def use(self, size: int) -> None:
        """What a step takes on its way."""
        self.take(size)
        self.drop(size)

    def read(self) -> Reading:
        reserved = self.allocated + self.cached
        free = self.total - self.outside - reserved
        return Reading(*(size * MIB for size in (self.total, free, self.allocated, self.peak, reserved)))

    def reset_peak(self) -> None:
        self.peak = self.allocated

    def give_back(self) -> None:
        self.cached = 0
