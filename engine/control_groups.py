"""The control groups that hold this process: what a container may use of its machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class ControlGroup(NamedTuple):
    """folder: of its files. is_v2: whether they have the names of version 2."""

    folder: Path
    is_v2: bool


def control_groups(root: Path, controller: str) -> Iterator[ControlGroup]:
    """Those that this process is in by `proc` and `sys` under `root`, innermost first: the limit of each one holds.

    controller: `memory` or `cpu`. A container often sees its own group as the top, under the path that it has outside;
    folders that are not there are read as empty.
    """
    mount = root / "sys/fs/cgroup"
    for line in lines_of(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            top, is_v2 = mount / controller, False
        elif not controllers:
            top, is_v2 = mount, True
        else:
            continue
        inside = top / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder.is_relative_to(top):
                yield ControlGroup(folder, is_v2)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of time that this process and its kin may take, None for no limit."""
    found = []
    for folder, is_v2 in control_groups(root, "cpu"):
        if is_v2:
            words = " ".join(lines_of(folder / "cpu.max")).split()  # "150000 100000" or "max 100000"
        else:
            words = [*lines_of(folder / "cpu.cfs_quota_us"), *lines_of(folder / "cpu.cfs_period_us")]  # -1: no limit
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def lines_of(path: Path) -> list[str]:
    """Lines of a file of the system; none on another system, or a kernel without this file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
