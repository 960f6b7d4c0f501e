"""The most memory that the processes of a run have held, as the kernel counted it."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from phalanx.engine.messages import RankReady

PROC = Path("/proc")


class PeakMemory(NamedTuple):
    """Host memory in bytes since the processes began, loading included; None where nothing says.

    ranks_bytes: of all rank processes on this machine together; largest_rank_bytes: of the largest. process_bytes: of
    this process, which is a rank's too where there is one rank. num_unknown: ranks on other machines, or gone.
    """

    ranks_bytes: int | None
    largest_rank_bytes: int | None
    process_bytes: int | None
    num_unknown: int


class _Process(NamedTuple):
    """peak_bytes: most resident. shared_bytes: resident now, and in other processes too."""

    peak_bytes: int
    shared_bytes: int


def peak_memory(ranks: Sequence[RankReady], proc: Path = PROC) -> PeakMemory:
    """To be asked while the ranks live. proc: where the kernel tells of processes.

    Together, what processes share now (libraries, segments of shared memory) counts once: as much as the one with the
    most of it has.
    """
    here = socket.gethostname()
    of_ranks = [_read(proc, rank.pid) if rank.node == here else None for rank in ranks]
    found = {rank.pid: process for rank, process in zip(ranks, of_ranks, strict=True) if process is not None}.values()
    this = _read(proc, os.getpid())
    return PeakMemory(
        ranks_bytes=_together(found) if found else None,
        largest_rank_bytes=max((process.peak_bytes for process in found), default=None),
        process_bytes=None if this is None else this.peak_bytes,
        num_unknown=of_ranks.count(None),
    )


def _read(proc: Path, pid: int) -> _Process | None:
    """None for another system, and for a process that is gone or another user's."""
    try:
        peak = _fields(proc / str(pid) / "status")["VmHWM"]
        now = _fields(proc / str(pid) / "smaps_rollup")
    except (OSError, KeyError):
        return None
    return _Process(peak, now["Shared_Clean"] + now["Shared_Dirty"])


def _together(processes: Collection[_Process]) -> int:
    own_bytes = sum(process.peak_bytes - process.shared_bytes for process in processes)
    return own_bytes + max(process.shared_bytes for process in processes)


def _fields(path: Path) -> dict[str, int]:
    """Sizes in bytes by name, of lines such as `VmHWM:   1920 kB`."""
    words = [line.split() for line in path.read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in words if line[2:] == ["kB"]}
