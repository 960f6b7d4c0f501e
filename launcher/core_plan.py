"""Which cores each of the ranks that share a machine computes on: pure planning over its topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from phalanx.launcher.topology import Core, Topology


class CorePlan(NamedTuple):
    """cores: of each rank, or none at all where ranks are not held to any. reason: why."""

    cores: tuple[tuple[Core, ...], ...]
    reason: str


def plan_cores(topology: Topology, groups: Sequence[int], num_threads: int) -> CorePlan:
    """Deals disjoint cores to the ranks of a machine, in the order of their indices.

    groups: ranks of each tensor group there, one group after another. num_threads: of a rank; it gets as many physical
    cores, or where there are fewer and their hardware threads suffice, its part of them.

    A rank's cores are near one memory node where a node has so many, and so are those of a tensor group; groups keep
    apart from each other, for each to have a node's bandwidth. Whole cores come first.
    """
    num_ranks, num_cores = sum(groups), len(topology.cores)
    if topology.quota is not None and topology.quota < len(topology.cpus):
        return CorePlan((), f"their time is limited, to that of {topology.quota:g} cores, and not the cores themselves")
    if num_ranks * num_threads > len(topology.cpus) or num_ranks > num_cores:
        ranks, threads = _counted(num_ranks, "rank"), _counted(num_threads, "thread")
        return CorePlan((), f"{ranks} of {threads} are more than {_counted(num_cores, 'core')} can take apart")
    if num_ranks == 1 and num_threads >= num_cores:
        return CorePlan((), "one rank computes on all of them")
    share = min(num_threads, num_cores // num_ranks)
    free = _by_node(topology)
    dealt: list[tuple[Core, ...]] = []
    for size in groups:
        together = _roomiest(free, size * share)
        for _ in range(size):
            node = together if together is not None else _next_node(free, share, dealt)
            dealt.append(_take(free, share, node))
    if any(sum(len(core.cpus) for core in mine) < num_threads for mine in dealt):
        return CorePlan((), f"{_counted(share, 'core')} a rank cannot run {num_threads} threads at once")
    return CorePlan(tuple(dealt), "each rank has its own")


def _by_node(topology: Topology) -> dict[int, list[Core]]:
    nodes: dict[int, list[Core]] = {}
    for core in sorted(topology.cores, key=lambda core: (core.node, not core.whole, core.cpus)):
        nodes.setdefault(core.node, []).append(core)
    return nodes


def _roomiest(free: dict[int, list[Core]], wanted: int) -> int | None:
    """The node with most free cores, if it has so many; the first of several."""
    node = max(free, key=lambda node: (len(free[node]), -node))
    return node if len(free[node]) >= wanted else None


def _next_node(free: dict[int, list[Core]], share: int, dealt: Sequence[tuple[Core, ...]]) -> int | None:
    """Where the last rank lies as long as there is room, else where there is most."""
    if dealt and len(free[dealt[-1][0].node]) >= share:
        return dealt[-1][0].node
    return _roomiest(free, share)


def _take(free: dict[int, list[Core]], share: int, node: int | None) -> tuple[Core, ...]:
    """Of one node, or None for what is left of all."""
    taken: list[Core] = []
    for each in free if node is None else [node]:
        while free[each] and len(taken) < share:
            taken.append(free[each].pop(0))
    return tuple(taken)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
