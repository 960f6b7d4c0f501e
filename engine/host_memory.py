"""Memory of this machine as Linux tells it, or of the container (control group) that this process is held in."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

from phalanx.engine.control_groups import control_groups, lines_of


class HostMemory(NamedTuple):
    """total_bytes: all of it. free_bytes: what can be had now without swapping, by `MemAvailable` and by what each
    control group leaves of its limit. None where nothing says.
    """

    total_bytes: int | None
    free_bytes: int | None


class _Files(NamedTuple):
    """Names in a control group's folder; the lines of `stat` that count file pages, which are given up when asked."""

    limit: str
    usage: str
    reclaimable: frozenset[str]


_LIBC = ctypes.CDLL(None)
_STAT = "memory.stat"
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", frozenset({"total_inactive_file", "total_active_file"}))
_V2 = _Files("memory.max", "memory.current", frozenset({"inactive_file", "active_file"}))


def host_memory(root: Path = Path("/")) -> HostMemory:
    """What `proc` and `sys` under `root` say now."""
    figures = _figures(root / "proc/meminfo")
    totals = [figures["MemTotal:"] * 1024] if "MemTotal:" in figures else []
    free = [figures["MemAvailable:"] * 1024] if "MemAvailable:" in figures else []
    for folder, is_v2 in control_groups(root, "memory"):
        files = _V2 if is_v2 else _V1
        limit = _number(folder / files.limit)
        if limit is None:
            continue
        totals.append(limit)
        usage = _number(folder / files.usage)
        if usage is not None:
            given_up = sum(size for name, size in _figures(folder / _STAT).items() if name in files.reclaimable)
            free.append(max(0, limit - max(0, usage - given_up)))
    return HostMemory(min(totals, default=None), min(free, default=None))


def give_back() -> None:
    """Returns to the system what was freed and is held for later: of reading 257 MB of weights, 50 MB."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc's
        _LIBC.malloc_trim(0)


def _figures(path: Path) -> dict[str, int]:
    """First number of each line, by the line's first word."""
    words = [line.split() for line in lines_of(path)]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _number(path: Path) -> int | None:
    """The number that a file holds; None for none, or for `max`."""
    return next((int(line) for line in lines_of(path) if line.isdecimal()), None)
