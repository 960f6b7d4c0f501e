"""What runs ranks: the interface that Ray actors, plain processes and a thread of this process share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from phalanx.engine.messages import RankSpec
from phalanx.launcher.pinning import MachineShare

DEFAULT_TARGET = "phalanx.engine.run_rank:run_rank"
"""The function a rank's process runs, as `module:function`; it takes a RankSpec and blocks for the rank's life."""

EXIT_GRACE_S = 2.0  # between asking a process to end and ending it


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """Where and with what the ranks run.

    ray: `none` (plain processes here), `local` (a private Ray on this machine), `auto` (the Ray cluster this machine
    belongs to) or `host:port` of one. device: `cpu` or `cuda`. cpus_per_rank, gpus_per_rank: what a rank takes of its
    node, fractions allowed; None as GPUs is one on `cuda` and none on `cpu`. resources_per_rank: Ray's custom
    resources, and `memory` in bytes. interface: network interface that ranks and engine use, or None for the default
    route.
    spread_stage: a stage may be divided over nodes. start_timeout_s: how long all ranks together may take to be ready.
    apart: no rank runs in this process, not even where there is only one. pin_cores: ranks on CPUs are held to cores.
    """

    ray: str = "local"
    device: str = "cpu"
    cpus_per_rank: float = 1.0
    gpus_per_rank: float | None = None
    resources_per_rank: Mapping[str, float] = field(default_factory=dict)
    interface: str | None = None
    spread_stage: bool = False
    start_timeout_s: float = 300.0
    apart: bool = False
    pin_cores: bool = True

    @property
    def rank_needs(self) -> dict[str, float]:
        """What a rank takes, by Ray's resource names."""
        gpus = self.gpus_per_rank if self.gpus_per_rank is not None else float(self.device == "cuda")
        return {"CPU": self.cpus_per_rank, "GPU": gpus, **self.resources_per_rank}

    @property
    def unpinned(self) -> str:
        """Why ranks are not to be held to cores, or empty."""
        if self.device != "cpu":
            return "ranks compute on GPUs"  # the cores near each are its driver's to know
        return "" if self.pin_cores else "cluster.pin_cores is false"

    def share_here(self, spec: RankSpec) -> MachineShare:
        """Of a rank where those of all replicas run on this machine."""
        layout = spec.layout
        groups = tuple(stage.num_ranks for stage in layout.stages) * layout.replicas
        return MachineShare(spec.replica * layout.num_ranks + spec.rank, groups, unpinned=self.unpinned)


@dataclass(frozen=True, slots=True)
class RankExit:
    """The end of a rank.

    kind: `killed` (a signal, or its node was lost), `failed` (an exception or an exit code) or `ended` (it returned).
    message: one line. traceback: its own, or the last lines it wrote to standard error; empty where there are none.
    symptom: whether its exception blames another rank.
    """

    rank: int
    node: str
    kind: Literal["killed", "failed", "ended"]
    message: str
    traceback: str = ""
    symptom: bool = False


class RankHost(Protocol):
    """Starts the ranks of one replica, says which have ended, and ends them all. Used from one thread."""

    @property
    def address(self) -> str:
        """Address of this machine that every rank can reach: where the engine and the rendezvous store listen."""
        ...

    @property
    def startup_s(self) -> Mapping[str, float]:
        """Seconds the host itself took to get ready, by part (`ray`)."""
        ...

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Starts one rank a specification, in any order and all at once; returns before they are ready.

        A specification whose `num_threads` is 0 gets its share of the cores of its node.
        Raises PlacementError where they cannot be placed.
        """
        ...

    def nodes(self) -> dict[int, str]:
        """Node of each started rank, as a reader knows it."""
        ...

    def exits(self) -> list[RankExit]:
        """The ranks that ended since the last call. Never blocks; costs well under a millisecond."""
        ...

    def stop(self, timeout_s: float) -> None:
        """Waits up to `timeout_s` for the ranks to end by themselves, ends the rest and releases all. Idempotent."""
        ...
