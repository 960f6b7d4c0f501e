"""Something else in the place of jitted kernels for a while: what a launcher finds there is not on its GPU's path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction


@contextmanager
def swapped(modules: Iterable[ModuleType], replacement: Callable[[JITFunction], Any]) -> Iterator[None]:
    """Every jitted function that the modules name is `replacement` of it; one replacement for one function."""
    made: dict[int, Any] = {}
    before: list[tuple[ModuleType, str, JITFunction]] = []
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    if id(value) not in made:
                        made[id(value)] = replacement(value)
                    before.append((module, name, value))
                    setattr(module, name, made[id(value)])
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
