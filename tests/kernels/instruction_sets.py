"""The native operators in one set of instructions of those that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from phalanx.kernels import native_cpu
from phalanx.native import find_native, resize_pool

NATIVE = find_native()
SETS = NATIVE.library.instruction_sets if NATIVE.library is not None else ()

every_set = pytest.mark.parametrize("chosen", range(len(SETS)), ids=SETS)
needs_native = pytest.mark.skipif(not SETS, reason=f"needs the native library: {NATIVE.told}")


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
        patch.setattr(native_cpu, "LIBRARY", _OneSet(NATIVE.library, chosen))
        yield


@contextmanager
def threads(count: int) -> Iterator[None]:
    library: Any = NATIVE.library
    before = library.pool_size()
    resize_pool(count)
    try:
        yield
    finally:
        resize_pool(before)
