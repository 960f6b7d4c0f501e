"""The cores that a rank's process is held to."""

from __future__ import annotations

from typing import NamedTuple


class HeldCores(NamedTuple):
    """cpus: hardware threads by the system's numbers, none where the process may run on any that it is given. nodes: of
    memory that they are near, where the machine has several. reason: why they are so, or why there are none.
    """

    cpus: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    reason: str = "nothing was asked for"


NO_CORES = HeldCores()
