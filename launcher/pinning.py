"""A rank's process on its cores: which they are, that nobody else of ours is on them, and how many threads they carry.

Its memory needs no binding: what a thread touches first is taken from the node that it runs near, and threads that stay
on a node's cores touch it there. A preferred node (`set_mempolicy`) would name the same node.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

import msgspec

from phalanx.engine.held_cores import HeldCores
from phalanx.launcher.core_plan import plan_cores
from phalanx.launcher.topology import Topology, read_topology


class MachineShare(msgspec.Struct, frozen=True, array_like=True):
    """A rank's part of its machine, among the ranks that it shares it with.

    index: its number among them. groups: ranks of each tensor group there, in the order of the indices. num_cpus: cores
    that they may take together by what the cluster says of the machine, None for all that there are. unpinned: why they
    are not to be held to cores, or empty.
    """

    index: int
    groups: tuple[int, ...]
    num_cpus: int | None = None
    unpinned: str = ""


_held: list[socket.socket] = []  # claims of this process, for as long as it lives


def even_threads(share: MachineShare, topology: Topology) -> int:
    """Threads of each rank where the cores are dealt evenly, at least one."""
    cores = topology.num_usable if share.num_cpus is None else min(topology.num_usable, share.num_cpus)
    return max(1, cores // sum(share.groups))


def take_cores(share: MachineShare, num_threads: int, topology: Topology | None = None) -> HeldCores:
    """Holds this process to its cores, all of its threads and those they will start, where that can be."""
    topology = read_topology() if topology is None else topology
    if share.unpinned or not hasattr(os, "sched_setaffinity"):
        return HeldCores(reason=share.unpinned or "this system has no way to hold a process to them")
    plan = plan_cores(topology, share.groups, num_threads)
    if not plan.cores:
        return HeldCores(reason=plan.reason)
    mine = plan.cores[share.index]
    cpus = tuple(sorted(cpu for core in mine for cpu in core.cpus))
    taken = claims(cpus)
    if not taken:
        return HeldCores(reason="another run has taken its cores")
    _held.extend(taken)
    hold(cpus)
    nodes = {core.node for core in topology.cores}
    return HeldCores(cpus, tuple(sorted({core.node for core in mine})) if len(nodes) > 1 else (), plan.reason)


def claims(cpus: Iterable[int]) -> list[socket.socket]:
    """Takes hardware threads for this process until these are closed or it ends: all, or none where somebody has one.

    By a name in the system's abstract socket namespace for each (unix(7)): it goes with the process, however that ends.
    """
    taken: list[socket.socket] = []
    for cpu in cpus:
        name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        taken.append(name)
        try:
            name.bind(f"\0phalanx-core-{cpu}")
        except OSError:
            for each in taken:
                each.close()
            return []
    return taken


def hold(cpus: Iterable[int]) -> None:
    """Holds every thread of this process to hardware threads; one that it starts later takes after who starts it."""
    cpus = frozenset(cpus)
    if sys.platform != "linux":
        raise NotImplementedError
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cpus)
        except ProcessLookupError:
            continue  # it has ended
