"""The native library, where it was built; Phalanx works without it, slower."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple


class Native(NamedTuple):
    """library: the extension, or None. told: which one it is, or why there is none and what to do, as half a sentence.

    Without one, what it would have done is done by torch.
    """

    library: ModuleType | None
    told: str


def find_native() -> Native:
    """Cheap after the first call."""
    try:
        from phalanx import _native
    except ModuleNotFoundError as error:
        if error.name not in (None, "phalanx._native"):
            raise
        return Native(None, "the native library is not built; install a C++ compiler, then Phalanx anew")
    except ImportError as error:
        if "cannot import name" in str(error):
            return Native(None, "the native library is not built; install a C++ compiler, then Phalanx anew")
        return Native(None, f"the native library does not load ({error}); install Phalanx anew")
    return Native(_native, f"native library, {_native.instruction_sets[0]}")


def resize_pool(num_threads: int) -> None:
    """Gives the native operators so many threads, the caller's included, as `torch.set_num_threads` does to torch's."""
    library = find_native().library
    if library is not None:
        library.resize_pool(num_threads)
