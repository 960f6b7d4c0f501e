"""The cores of this machine that this process may use, and the memory nodes they belong to."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phalanx.engine.control_groups import cpu_quota, lines_of


class Core(NamedTuple):
    """A physical core. cpus: its hardware threads that this process may use, by the system's numbers. node: whose
    memory is near. whole: whether it has no other hardware threads, on which others may run.
    """

    cpus: tuple[int, ...]
    node: int
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Topology:
    """cores: those that this process may use. quota: cores' worth of time that it may take, None for no limit."""

    cores: tuple[Core, ...]
    quota: float | None = None

    @property
    def num_usable(self) -> int:
        """Threads that compute at full speed at once: a physical core each, and no more than the quota; at least 1."""
        quota = math.inf if self.quota is None else math.floor(self.quota)
        return int(max(1, min(len(self.cores), quota)))

    @property
    def cpus(self) -> frozenset[int]:
        """Hardware threads of all cores."""
        return frozenset(cpu for core in self.cores for cpu in core.cpus)


def read_topology(allowed: Collection[int] | None = None, root: Path = Path("/")) -> Topology:
    """By `proc` and `sys` under `root`. allowed: hardware threads to use, by default those this process may run on.

    Where the system does not say what belongs together, each is taken for a core of its own, near node 0.
    """
    if allowed is None:
        has_affinity = hasattr(os, "sched_getaffinity")
        allowed = os.sched_getaffinity(0) if has_affinity else range(os.cpu_count() or 1)
    nodes: dict[int, int] = {}
    for folder in sorted((root / "sys/devices/system/node").glob("node[0-9]*")):
        number = int(folder.name.removeprefix("node"))
        nodes.update(dict.fromkeys(_listed(folder / "cpulist"), number))
    cores: dict[int, Core] = {}
    for cpu in sorted(allowed):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        siblings = _listed(topology / "core_cpus_list") or _listed(topology / "thread_siblings_list") or {cpu}
        usable = tuple(sorted(siblings.intersection(allowed)))
        cores.setdefault(min(siblings), Core(usable, nodes.get(cpu, 0), len(usable) == len(siblings)))
    return Topology(tuple(cores.values()), cpu_quota(root))


def cores_here() -> int:
    """Threads that compute at full speed at once in this process."""
    return read_topology().num_usable


def spans(numbers: Iterable[int]) -> str:
    """As the system writes them: `0-3,8`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _listed(path: Path) -> set[int]:
    """The numbers of a list such as `0-3,8`; none where the file is missing."""
    found: set[int] = set()
    for part in ",".join(lines_of(path)).split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal():
            found.update(range(int(first), int(last or first) + 1))
    return found
