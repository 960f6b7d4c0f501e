"""The native operators in one set of instructions of those that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tests.native_library import excuse_for_no_library

from phalanx.kernels import native_cpu
from phalanx.kernels.native import find_native, resize_pool

SETS = find_native().library.instruction_sets if find_native().library is not None else ()

every_set = pytest.mark.parametrize("chosen", range(len(SETS)), ids=SETS)


def needs_native() -> pytest.MarkDecorator:
    """For a module. Where the library must be there, its tests fail without it."""
    excuse = excuse_for_no_library()
    return pytest.mark.skipif(not SETS and bool(excuse), reason=f"needs the native library: {excuse}")


class _OneSet:
    """The library, or an object of it, with the choice behind the arguments of whatever computes."""

    def __init__(self, of: Any, chosen: int) -> None:
        self._of = of
        self._chosen = chosen

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._of, name)
        if name == "HeadLists":
            return found
        if name == "AttentionSteps":
            return lambda *arguments: _OneSet(found(*arguments), self._chosen)
        return lambda *arguments: found(*arguments, self._chosen)


@contextmanager
def only(chosen: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_cpu, "LIBRARY", _OneSet(find_native().library, chosen))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    library: Any = find_native().library
    before = library.pool_size()
    resize_pool(count)
    try:
        yield
    finally:
        resize_pool(before)
