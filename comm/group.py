"""What a backend must know to build one rank's end of a group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phalanx.comm.ledger import Ledger

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """One rank's place in a group.

    rank: number in the group. size: ranks in it. name: of the group, unique on its store; used in messages.
    device: `cpu`, `cuda` or `cuda:N`, where the tensors live. timeout_s: longest wait for another rank.
    store: where the ranks of this group alone find each other, or None in a group of one.
    address: of the network interface to bind to, or None in a group of one.
    reason: why the backend that is given this was chosen.
    member: what the others call this rank in messages beside its number, such as `on host-3`.
    machines: the number of each rank's machine, counted from 0 in the order of ranks; empty where nobody asked.
    numbers: of the ranks in the group that this one is a part of, by which messages call them; empty for a group of its
    own.
    """

    rank: int
    size: int
    name: str = "world"
    device: str = "cpu"
    timeout_s: float = 60.0
    store: Store | None = None
    address: str | None = None
    ledger: Ledger = field(default_factory=Ledger)
    reason: str = ""
    member: str = ""
    machines: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()

    def called(self, rank: int) -> int:
        """The number of a rank in messages."""
        return self.numbers[rank] if self.numbers else rank
