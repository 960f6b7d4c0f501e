"""The links that the groups of a run use, where they are between machines and their rate is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from phalanx.engine.messages import RankReady
from phalanx.launcher.bench_comm.groups import Op, crossing_share

_OPS: Mapping[str, Op] = {
    "all_reduce": "all_reduce",
    "fused_all_reduce_rms_norm": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "broadcast": "broadcast",
    "send": "send_recv",
    "recv": "send_recv",
}


class GroupLink(NamedTuple):
    """machines: of each rank of the group, the same number for the same machine. bytes_per_s: of its slowest link."""

    machines: tuple[int, ...]
    bytes_per_s: float

    def crossing_bytes(self, op: str, num_bytes: int) -> float:
        """Of a tensor of `num_bytes`, what some machine must send or receive at the least. A send and a recv in a group
        of several machines are taken to be between two of them.
        """
        return num_bytes * crossing_share(_OPS[op], self.machines) if op in _OPS else 0.0


def group_links(ready: Sequence[RankReady]) -> dict[str, GroupLink]:
    """By group, of those between machines whose rates are known. ready: of all ranks of a replica, in order."""
    nodes = [each.node for each in ready]
    links = {}
    for group, ranks in {group: ranks for each in ready for group, ranks in each.groups.items()}.items():
        rates = [ready[rank].link_bytes_per_s for rank in ranks]
        if len({nodes[rank] for rank in ranks}) > 1 and min(rates) > 0:
            links[group] = GroupLink(tuple(nodes.index(nodes[rank]) for rank in ranks), min(rates))
    return links
