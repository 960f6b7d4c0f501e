"""Made-up machines, as files that the system would show."""

from __future__ import annotations

from pathlib import Path

from phalanx.launcher.core_plan import plan_cores
from phalanx.launcher.pinning import claims
from phalanx.launcher.topology import Core, Topology, read_topology


def lay_machine(root: Path, *, nodes: int = 1, cores_per_node: int = 2, threads: int = 1) -> Path:
    """Numbered as Linux does on x86: the first hardware thread of every core, then the second of every core."""
    cores = nodes * cores_per_node
    for cpu in range(cores * threads):
        siblings = ",".join(str(cpu % cores + cores * thread) for thread in range(threads))
        folder = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "core_cpus_list").write_text(f"{siblings}\n")
    for node in range(nodes):
        first = node * cores_per_node
        ranges = [f"{first + cores * t}-{first + cores * t + cores_per_node - 1}" for t in range(threads)]
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(ranges) + "\n")
    return root


def machine(*nodes: int, threads: int = 1, quota: float | None = None) -> Topology:
    """A machine of nodes with so many cores, whose hardware threads follow each other."""
    placed = [node for node, count in enumerate(nodes) for _ in range(count)]
    cores = (Core(tuple(range(core * threads, (core + 1) * threads)), node) for core, node in enumerate(placed))
    return Topology(tuple(cores), quota)


def can_divide_cores() -> bool:
    """Whether two ranks can have this machine's cores to themselves now."""
    topology = read_topology()
    if not plan_cores(topology, [2], topology.num_usable // 2 or 1).cores:
        return False
    taken = claims(topology.cpus)
    for each in taken:
        each.close()
    return bool(taken)
