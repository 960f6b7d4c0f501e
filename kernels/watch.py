"""What operators are called in a step, when, and what each has to do: what profiles are made of.

Native operators are timed where they are called, in recordings that are replayed too (`kernels/csrc/watch.hpp`); the
others by `watched`, which doors to PyTorch and Triton go through while somebody watches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from phalanx.kernels import native_cpu
from phalanx.kernels.names import in_range, profiled

Result = TypeVar("Result")


class Work(NamedTuple):
    """What a call does. sizes: that say something of it. num_bytes, num_flops: the least to be read and written, and to
    be calculated. weight: the address of the matrix that it multiplies by, or 0.
    """

    operator: str
    sizes: tuple[int, ...]
    num_bytes: float
    num_flops: float = 0.0
    weight: int = 0

    @property
    def load(self) -> str:
        return " x ".join(map(str, self.sizes))


def product_work(operator: str, moved: float, x: torch.Tensor, weight: torch.Tensor, *_: Any) -> Work:
    """Of x [T, in] and weight [out, in]. moved: how often its output, or as much, is read and written."""
    num_rows, (outputs, inputs) = len(x), weight.shape
    num_bytes = weight.nbytes + num_rows * (inputs + moved * outputs) * x.itemsize
    return Work(operator, (num_rows, outputs, inputs), num_bytes, 2.0 * num_rows * outputs * inputs, weight.data_ptr())


class OperatorCall(NamedTuple):
    """Seconds of the clock of `time.perf_counter`, on the CPU: a GPU may do the work later."""

    work: Work
    started_s: float
    ended_s: float


class CallWatch:
    """The operators that a thread calls while it is watched. One watch of a process at a time."""

    def __init__(self) -> None:
        self._native = None if native_cpu.LIBRARY is None else native_cpu.LIBRARY.CallWatch()
        self._told: list[OperatorCall] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """This thread, and what `watched` tells of any."""
        global current  # noqa: PLW0603
        current = self
        if self._native is not None:
            self._native.begin()
        try:
            yield
        finally:
            current = None
            if self._native is not None:
                self._native.end()

    def add(self, call: OperatorCall) -> None:
        self._told.append(call)

    def take(self) -> list[OperatorCall]:
        """Those since the last time, in their order."""
        told, self._told = self._told, []
        native = () if self._native is None else self._native.take()
        told += [OperatorCall(Work(*work), started_s, ended_s) for *work, started_s, ended_s in native]
        return sorted(told, key=lambda call: call.started_s)


current: CallWatch | None = None
"""Of this process. Whoever calls operators that are not native asks before, and goes through `watched` if there is one.
"""


def watched(count: Callable[..., Work], function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """function(*arguments, **options), told to the watch, and seen by other profilers, as the Work that `count` finds
    in the same arguments.
    """
    work = count(*arguments, **options)
    seen = in_range(work.operator, work.load, function) if profiled() else function
    started_s = time.perf_counter()
    result = seen(*arguments, **options)
    if current is not None:
        current.add(OperatorCall(work, started_s, time.perf_counter()))
    return result
