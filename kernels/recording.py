"""`Recording`: the native calls of a step, to be made again and again in one go, without the interpreter.

What is kept are addresses: a replay reads its input where it was recorded to lie, and leaves its result there.
Operators of torch cannot be kept. `Recording.by_hand` makes such a call in every replay; any other is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from phalanx.kernels import native_cpu


class NotRecordableError(RuntimeError):
    """Something was computed that a replay would not compute."""


class Arena:
    """Memory for what a recorded step makes on its way, of which little is needed at a time.

    A step is made up of turns (the layers of a model). What is taken in one stays until the end of the next, then its
    memory is taken again; what is taken before the first turn stays to the end of the step. Recordings that never run
    at the same time may share an arena.
    """

    def __init__(self) -> None:
        self._blocks: tuple[list[torch.Tensor], ...] = ([], [], [])  # of even turns, of odd ones, of none
        self._outgrown: list[torch.Tensor] = []  # recordings may read and write there
        self._turn = 2
        self._num_taken = 0

    def begin(self) -> None:
        """A step."""
        self._turn = 2
        self._num_taken = 0

    def turn(self) -> None:
        self._turn = 1 if self._turn == 0 else 0
        self._num_taken = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        num_bytes = math.prod(shape) * dtype.itemsize
        blocks, place = self._blocks[self._turn], self._num_taken
        self._num_taken += 1
        if place == len(blocks):
            blocks.append(_block(num_bytes))
        elif blocks[place].nbytes < num_bytes:
            self._outgrown.append(blocks[place])
            blocks[place] = _block(num_bytes)
        return blocks[place][:num_bytes].view(dtype).view(shape)


def _block(num_bytes: int) -> torch.Tensor:
    """Of a power of two bytes, so that it is seldom outgrown."""
    return torch.empty(1 << max(num_bytes - 1, 1).bit_length(), dtype=torch.uint8)


class Follower(Protocol):
    """Is told before a stretch of native calls is replayed, and after."""

    def before(self) -> None: ...

    def after(self) -> None: ...


F = TypeVar("F", bound=Follower)


class Recording:
    """What is called within `record` is not done there, but by `replay`. On the CPU, where there is a native library.

    Tensors made within belong to the arena, see there, and hold anything until the replay. Whoever records keeps alive
    what else the calls read and write.
    """

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self._calls: list[Callable[[], object]] = []
        self._stretch = _Stretch()  # that is being recorded, once one is

    @contextmanager
    def record(self) -> Iterator[None]:
        """Raises NotRecordableError out of whatever computes something by torch."""
        self.arena.begin()
        self._begin()
        try:
            with _Watch(self.arena):
                yield
        finally:
            self._stretch.program.end()

    def by_hand(self, call: Callable[[], object]) -> None:
        """To be made in every replay, in its place among the others. It finds its input, and leaves its result, in
        tensors that it holds.
        """
        self._stretch.program.end()
        self._calls.append(call)
        self._begin()

    def followed_by(self, who: object, make: Callable[[], F]) -> F:
        """The follower, on behalf of `who`, of the native calls up to the next that is made by hand."""
        followers = self._stretch.followers
        if who not in followers:
            followers[who] = make()
        return cast(F, followers[who])

    def replay(self) -> None:
        for call in self._calls:
            call()

    def _begin(self) -> None:
        self._stretch = _Stretch()
        self._stretch.program.begin()
        self._calls.append(self._stretch)


class _Stretch:
    """Native calls between two that are made by hand."""

    def __init__(self) -> None:
        self.program = native_cpu.LIBRARY.Program()
        self.followers: dict[object, Follower] = {}

    def __call__(self) -> None:
        for follower in self.followers.values():
            follower.before()
        self.program.run()
        for follower in self.followers.values():
            follower.after()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Gives out memory of the arena, and refuses whatever else is not a view."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._arena = arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is ever compiled. To be skipped by the compiler, torch would import it: a second, and 70 MB."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name == "empty":
            return self._arena.take(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if name == "empty_like":
            return self._arena.take(args[0].shape, kwargs.get("dtype") or args[0].dtype)
        if name == "new_empty":
            return self._arena.take(args[1], kwargs.get("dtype") or args[0].dtype)
        raise NotRecordableError(f"{func} is computed by torch")
