"""How long names may take to be looked up."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator


@contextlib.contextmanager
def brief_lookups() -> Iterator[None]:
    """While it lasts, name servers are asked once by this thread, and given up after a second each.

    torch's stores want the name of each address that they connect to, for their log, and wait for it as long as the
    system does: by default 10 s where no name server answers. Only glibc can be told; elsewhere nothing changes.
    """
    try:
        libc = ctypes.CDLL(None)
        find_state, initialise = libc.__res_state, libc.__res_init
    except (OSError, AttributeError):
        yield
        return
    find_state.restype = ctypes.POINTER(ctypes.c_int)
    initialise()
    state = find_state()  # resolv.h: begins with retrans, in seconds, and retry, a number of attempts; a thread's own
    before = state[0], state[1]
    state[0] = state[1] = 1
    try:
        yield
    finally:
        state[0], state[1] = before
