"""Which node each rank runs on: pure planning over a snapshot of the cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from phalanx.errors import PlacementError
from phalanx.parallel.layout import Layout, Stage

SEARCH_STEPS = 50_000  # placements tried before the search gives up; unlike stages on a handful of nodes need hundreds


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster as it stood at one moment.

    node_id: unique. address: where its ranks listen. total, free: amounts by Ray's names (`CPU` cores, `GPU` devices,
    `memory` bytes, custom ones). accelerator: type such as `H100`, or None. labels: whatever the cluster says of it.
    """

    node_id: str
    address: str
    hostname: str
    total: Mapping[str, float]
    free: Mapping[str, float]
    accelerator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.hostname if self.hostname == self.address else f"{self.hostname} ({self.address})"

    def answers_to(self, name: str) -> bool:
        """Whether `name` is its address, host name (with or without domain), id, or a label of it as `key=value`."""
        key, equals, value = name.partition("=")
        if equals:
            return self.labels.get(key) == value
        return name in (self.address, self.hostname, self.hostname.partition(".")[0], self.node_id)

    def suits(self, stage: Stage) -> bool:
        """Whether it meets the constraints of `stage`."""
        if stage.node is not None and not self.answers_to(stage.node):
            return False
        return stage.accelerator is None or (self.accelerator or "").lower() == stage.accelerator.lower()

    def room(self, need: Mapping[str, float], held: Mapping[str, float]) -> int:
        """Ranks that `held` (its free or total resources) has room for, each taking `need`."""
        # Ray counts in ten-thousandths; a part in a million forgives what floating point lost on 0.1 + 0.2.
        counts = [int(min(held.get(name, 0.0) / amount, 1e6) + 1e-6) for name, amount in need.items() if amount > 0]
        return min(counts, default=1_000_000)


class _Item(NamedTuple):
    """A stage of one replica, to be put on a node. replica_ranks: ranks of the whole replica."""

    replica: int
    stage: Stage
    replica_ranks: int


def plan_placement(
    layout: Layout,
    need: Mapping[str, float],
    nodes: Sequence[Node],
    *,
    replicas: int | None = None,
    spread_stage: bool = False,
) -> tuple[tuple[str, ...], ...]:
    """A node id for each rank of each replica, in the order of `Layout.places`.

    need: what each rank takes, by resource name. replicas: how many to place, all of the layout's by default.
    The ranks of a stage share a node; with `spread_stage` a stage that fits on no single node may be divided.
    Stages of a replica are kept together, neighbours first.

    Raises PlacementError, naming what is missing on which node, where the free resources do not suffice.
    """
    count = layout.replicas if replicas is None else replicas
    if not nodes:
        raise PlacementError("the cluster has no live node; start one with `ray start --head`")
    unsuited = [stage for stage in layout.stages if not any(node.suits(stage) for node in nodes)]
    if unsuited:
        raise PlacementError("\n".join(_unsuited(stage, nodes) for stage in unsuited))
    items = [_Item(replica, stage, layout.num_ranks) for replica in range(count) for stage in layout.stages]
    rooms = {node.node_id: node.room(need, node.free) for node in nodes}
    whole = _place_whole(items, nodes, dict(rooms))
    if whole is not None:
        by_stage = {
            (item.replica, item.stage.index): [node_id] * item.stage.num_ranks for item, node_id in whole.items()
        }
    elif spread_stage and (divided := _place_ranks(items, nodes, dict(rooms))) is not None:
        by_stage = divided
    else:
        raise PlacementError(_refusal(layout, count, need, nodes, spread_stage))
    return tuple(
        tuple(node_id for stage in layout.stages for node_id in by_stage[replica, stage.index])
        for replica in range(count)
    )


def _place_whole(items: Sequence[_Item], nodes: Sequence[Node], rooms: dict[str, int]) -> dict[_Item, str] | None:
    """Each stage on one node, by depth-first search; None where there is no way (or none within SEARCH_STEPS)."""
    order = sorted(
        items,
        key=lambda item: (
            sum(n.suits(item.stage) for n in nodes),
            -item.stage.num_ranks,
            item.replica,
            item.stage.index,
        ),
    )
    chosen: dict[_Item, str] = {}
    barren: set[tuple[int, tuple[int, ...]]] = set()
    steps = 0

    def search(depth: int) -> bool:
        nonlocal steps
        if depth == len(order):
            return True
        state = (depth, tuple(rooms.values()))
        if state in barren:
            return False
        item = order[depth]
        for node in _preferred(item, nodes, rooms, chosen):
            steps += 1
            if steps > SEARCH_STEPS:
                return False
            rooms[node.node_id] -= item.stage.num_ranks
            chosen[item] = node.node_id
            if search(depth + 1):
                return True
            rooms[node.node_id] += item.stage.num_ranks
            del chosen[item]
        barren.add(state)
        return False

    return chosen if search(0) else None


def _preferred(item: _Item, nodes: Sequence[Node], rooms: Mapping[str, int], chosen: Mapping[_Item, str]) -> list[Node]:
    """The nodes with room for a stage, best first.

    First those its replica already uses, nearest stage first; then the tightest that can take all that is left of the
    replica; then the roomiest.
    """
    distance: dict[str, int] = {}
    for other, node_id in chosen.items():
        if other.replica == item.replica:
            apart = abs(other.stage.index - item.stage.index)
            distance[node_id] = min(apart, distance.get(node_id, apart))

    def merit(node: Node) -> tuple[int, bool, int]:
        room = rooms[node.node_id]
        takes_all = room >= item.replica_ranks
        return distance.get(node.node_id, 1_000_000), not takes_all, room if takes_all else -room

    fitting = [node for node in nodes if node.suits(item.stage) and rooms[node.node_id] >= item.stage.num_ranks]
    return sorted(fitting, key=merit)


def _place_ranks(
    items: Sequence[_Item], nodes: Sequence[Node], rooms: Mapping[str, int]
) -> dict[tuple[int, int], list[str]] | None:
    """Rank by rank, as a bipartite matching with augmenting paths (Kuhn): finds a way wherever there is one."""
    holders: dict[str, list[tuple[_Item, int]]] = {node.node_id: [] for node in nodes}
    placed: dict[tuple[_Item, int], str] = {}

    def settle(rank: tuple[_Item, int], visited: set[str]) -> bool:
        candidates = [node.node_id for node in nodes if node.suits(rank[0].stage) and node.node_id not in visited]
        for node_id in sorted(candidates, key=lambda n: -sum(other[0] == rank[0] for other in holders[n])):
            if node_id in visited or not rooms[node_id]:
                continue
            visited.add(node_id)
            if len(holders[node_id]) < rooms[node_id]:
                holders[node_id].append(rank)
                placed[rank] = node_id
                return True
            for other in list(holders[node_id]):
                if settle(other, visited):
                    holders[node_id].remove(other)
                    holders[node_id].append(rank)
                    placed[rank] = node_id
                    return True
        return False

    ranks = [(item, tensor_rank) for item in items for tensor_rank in range(item.stage.num_ranks)]
    if not all(settle(rank, set()) for rank in ranks):
        return None
    return {
        # Sorted, so that neighbours in the tensor-parallel group are neighbours on the wire.
        (item.replica, item.stage.index): sorted(
            placed[item, tensor_rank] for tensor_rank in range(item.stage.num_ranks)
        )
        for item in items
    }


def _unsuited(stage: Stage, nodes: Sequence[Node]) -> str:
    wants = []
    if stage.node is not None:
        wants.append(f"node {stage.node!r}")
    if stage.accelerator is not None:
        wants.append(f"accelerator {stage.accelerator!r}")
    found = ", ".join(f"{node} with {node.accelerator or 'no accelerator'}" for node in nodes)
    return (
        f"stage {stage.index} asks for {' and '.join(wants)}, but the cluster has {found}; "
        f"correct parallel.stages.{stage.index} or add such a node"
    )


def _refusal(
    layout: Layout, replicas: int, need: Mapping[str, float], nodes: Sequence[Node], spread_stage: bool
) -> str:
    """Says what is missing on which node: first for stages that fit nowhere, else for all of them together."""
    wanted = layout.num_ranks * replicas
    each = ", ".join(f"{name} {_amount(name, amount)}" for name, amount in need.items() if amount > 0)
    lines = []
    if not spread_stage:
        for stage in layout.stages:
            suited = [node for node in nodes if node.suits(stage)]
            if all(node.room(need, node.free) < stage.num_ranks for node in suited):
                lines.append(f"stage {stage.index} needs {stage.num_ranks} ranks on one node, each taking {each}:")
                lines.extend(f"  {line}" for line in _shortages(suited, need, stage.num_ranks))
    if not lines:
        stages = "" if len(layout.stages) * replicas == 1 else f" ({layout}, {replicas} to place)"
        lines.append(f"{wanted} ranks{stages}, each taking {each}, do not fit together:")
        lines.extend(f"  {line}" for line in _shortages(nodes, need, wanted))
    lines.append(f"try: {'; or '.join(_remedies(layout, need, nodes, wanted, spread_stage))}")
    return "the ranks cannot be placed: " + "\n".join(lines)


def _shortages(nodes: Iterable[Node], need: Mapping[str, float], ranks: int) -> Iterator[str]:
    for node in nodes:
        room = node.room(need, node.free)
        short = [
            f"{name}: {_amount(name, amount * ranks)} needed, {_amount(name, node.free.get(name, 0.0))} free of "
            f"{_amount(name, node.total.get(name, 0.0))}"
            for name, amount in need.items()
            if amount > 0 and node.free.get(name, 0.0) < amount * ranks - 1e-6
        ]
        yield f"node {node}: room for {min(room, ranks)} of {ranks}" + (f" ({'; '.join(short)})" if short else "")


def _remedies(
    layout: Layout, need: Mapping[str, float], nodes: Sequence[Node], wanted: int, spread_stage: bool
) -> Iterator[str]:
    if sum(node.room(need, node.total) for node in nodes) >= wanted:
        yield "free what other work on the cluster holds"
    widest = max(stage.num_ranks for stage in layout.stages)
    if not spread_stage and widest > 1 and sum(node.room(need, node.free) for node in nodes) >= wanted:
        yield "allow a stage on several nodes with cluster.spread_stage: true"
    if need.get("CPU", 0) > 0 and all(node.room({"CPU": need["CPU"]}, node.free) < wanted for node in nodes):
        yield "lower cluster.cpus_per_rank (fractions are allowed)"
    if need.get("GPU", 0) > 0 and all(node.room({"GPU": need["GPU"]}, node.free) < wanted for node in nodes):
        yield "share devices with a fraction as cluster.gpus_per_rank"
    yield "use fewer ranks, or add nodes"


def _amount(name: str, amount: float) -> str:
    return f"{amount / 2**30:.1f} GiB" if name in ("memory", "object_store_memory") else f"{amount:g}"
