"""Ranks as Ray actors, one a rank, held in place by a placement group."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from phalanx.engine.messages import RankSpec
from phalanx.errors import PlacementError
from phalanx.launcher.hosts import DEFAULT_TARGET, EXIT_GRACE_S, ClusterSettings, RankExit
from phalanx.launcher.pinning import MachineShare
from phalanx.launcher.placement import Node, plan_placement
from phalanx.launcher.rank_actor import RankActor
from phalanx.launcher.rank_main import RankReport
from phalanx.launcher.ray_cluster import RayCluster

GROUP_READY_S = 5.0  # a group that fits is ready within milliseconds
PLACE_S = 5.0  # how long to wait for resources that a formation just gave back
NODE_ID = "ray.io/node-id"  # the label that every node carries; addresses are not unique, two nodes may share a machine
LOG_BYTES = 4096

logger = logging.getLogger(__name__)


class RayHost:
    """Runs ranks on a Ray cluster. Several may share one."""

    def __init__(self, settings: ClusterSettings, num_ranks: int, target: str = DEFAULT_TARGET) -> None:
        """Connects to Ray, or starts one; raises PhalanxError where that cannot be done. num_ranks: it will start."""
        self._settings = settings
        self._target = target
        self._cluster = RayCluster(settings.ray, num_ranks)
        self._group: Any = None
        self._actors: dict[int, Any] = {}
        self._runs: dict[Any, int] = {}
        self._pids: dict[int, Any] = {}
        self._nodes: dict[int, Node] = {}
        self._stopped = False

    @property
    def address(self) -> str:
        return self._cluster.address

    @property
    def startup_s(self) -> Mapping[str, float]:
        return {"ray": self._cluster.connect_s}

    def start(self, specs: Sequence[RankSpec]) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        needs = self._cluster.needs(self._settings.rank_needs)
        nodes = self._place(specs, needs)
        self._nodes = {spec.rank: node for spec, node in zip(specs, nodes, strict=True)}
        actor_class = ray.remote(RankActor)
        custom = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
        for bundle, spec in enumerate(specs):
            actor = actor_class.options(
                num_cpus=needs.get("CPU", 0),
                num_gpus=needs.get("GPU", 0),
                memory=needs.get("memory"),
                resources=custom,
                max_restarts=0,
                max_task_retries=0,
                max_concurrency=2,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
            ).remote()
            self._actors[spec.rank] = actor
            share = msgspec.msgpack.encode(self._share(spec))
            self._pids[spec.rank] = actor.where.remote()
            run = actor.run.remote(self._target, msgspec.msgpack.encode(spec), spec.num_threads, share)
            self._runs[run] = spec.rank

    def nodes(self) -> dict[int, str]:
        return {rank: str(node) for rank, node in self._nodes.items()}

    def exits(self) -> list[RankExit]:
        if not self._runs:
            return []
        import ray

        ended, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
        return [self._exit_of(run, self._runs.pop(run)) for run in ended]

    def stop(self, timeout_s: float) -> None:
        if self._stopped:
            return
        self._stopped = True
        import ray

        try:
            if self._runs and ray.is_initialized():
                ray.wait(list(self._runs), num_returns=len(self._runs), timeout=timeout_s)
            if ray.is_initialized():
                self._release()
        finally:
            self._actors.clear()
            self._runs.clear()
            self._pids.clear()
            self._cluster.close()

    def _release(self) -> None:
        """Ends the actors, which have no more to do or did not end in time, and gives their resources back."""
        import ray

        pids = [self._pid(rank) for rank in self._nodes if self._is_here(rank)]
        for actor in self._actors.values():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor, no_restart=True)
        if self._group is not None:
            self._remove_group()
        deadline = time.monotonic() + EXIT_GRACE_S
        while any(pid is not None and _is_alive(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _place(self, specs: Sequence[RankSpec], needs: Mapping[str, float]) -> list[Node]:
        """Plans, and reserves what was planned. Plans again where another formation was faster."""
        deadline = time.monotonic() + PLACE_S
        while True:
            nodes = {node.node_id: node for node in self._cluster.nodes()}
            try:
                [plan] = plan_placement(
                    specs[0].layout, needs, list(nodes.values()), replicas=1, spread_stage=self._settings.spread_stage
                )
            except PlacementError:
                idle = [
                    Node(n.node_id, n.address, n.hostname, n.total, n.total, n.accelerator, n.labels)
                    for n in nodes.values()
                ]
                # Raises where it is hopeless: not even on an idle cluster.
                plan_placement(specs[0].layout, needs, idle, replicas=1, spread_stage=self._settings.spread_stage)
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
                continue
            if self._reserve(plan, needs):
                return [nodes[node_id] for node_id in plan]
            if time.monotonic() > deadline:
                wanted = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
                where = ", ".join(str(nodes[node_id]) for node_id in dict.fromkeys(plan))
                raise PlacementError(
                    f"Ray did not reserve {wanted} for each of {len(plan)} ranks on {where} within "
                    f"{GROUP_READY_S:g} s, although its figures say it is free; see `ray status` for what else waits, "
                    "or try again"
                )

    def _reserve(self, plan: Sequence[str], needs: Mapping[str, float]) -> bool:
        from ray.util.placement_group import placement_group

        self._group = placement_group(
            [dict(needs) for _ in plan],
            strategy="PACK",
            bundle_label_selector=[{NODE_ID: node_id} for node_id in plan],
        )
        if self._group.wait(GROUP_READY_S):
            return True
        self._remove_group()
        return False

    def _remove_group(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        group, self._group = self._group, None
        with contextlib.suppress(ray.exceptions.RayError):
            remove_placement_group(group)

    def _share(self, spec: RankSpec) -> MachineShare:
        """A rank's part of its node, once all are placed: among those of this replica, for others may be elsewhere."""
        if self._cluster.is_private:
            return self._settings.share_here(spec)
        node = self._nodes[spec.rank]
        stages = [place.stage for place in spec.layout.places() if self._nodes[place.rank].node_id == node.node_id]
        before = sum(self._nodes[rank].node_id == node.node_id for rank in range(spec.rank))
        return MachineShare(
            index=before,
            groups=tuple(stages.count(stage) for stage in dict.fromkeys(stages)),
            num_cpus=int(node.total.get("CPU", 1.0)),
            unpinned=self._settings.unpinned,
        )

    def _exit_of(self, run: Any, rank: int) -> RankExit:
        import ray

        node = str(self._nodes[rank])
        try:
            report = msgspec.msgpack.decode(ray.get(run), type=RankReport)
        except ray.exceptions.ActorDiedError as error:
            return RankExit(rank, node, "killed", _cause_of_death(str(error), self._head), self._last_words(rank))
        except Exception as error:
            return RankExit(rank, node, "failed", f"its actor failed: {type(error).__name__}", str(error))
        if report.message is None:
            return RankExit(rank, node, "ended", "returned")
        return RankExit(rank, node, "failed", report.message, report.traceback, report.symptom)

    @property
    def _head(self) -> str:
        """The node where Ray's head runs, as a reader knows it."""
        import ray

        address = ray.get_runtime_context().gcs_address.rpartition(":")[0]
        return next((str(node) for node in self._nodes.values() if node.address == address), address)

    def _is_here(self, rank: int) -> bool:
        import ray

        return bool(self._nodes[rank].address == ray.util.get_node_ip_address())

    def _pid(self, rank: int) -> int | None:
        import ray

        ready, _ = ray.wait([self._pids[rank]], timeout=0) if rank in self._pids else ([], [])
        with contextlib.suppress(ray.exceptions.RayError):
            return int(ray.get(ready[0])) if ready else None
        return None

    def _last_words(self, rank: int) -> str:
        """What the rank's process last wrote to standard error, where Ray's files of it are on this machine."""
        import ray

        pid = self._pid(rank) if self._is_here(rank) else None  # elsewhere it says nothing about this machine's files
        session = ray._private.worker._global_node
        if pid is None or session is None:
            return ""
        for file in Path(session.get_logs_dir_path()).glob(f"worker-*-{pid}.err"):
            with file.open("rb") as stream:
                stream.seek(max(0, file.stat().st_size - LOG_BYTES))
                lines = stream.read().decode(errors="replace").splitlines()
            return "\n".join(
                line for line in lines if not line.startswith(":")
            )  # Ray's own marks, such as `:actor_name:`
        return ""


def _cause_of_death(text: str, head: str) -> str:
    """One line out of Ray's account, which is a page of guesses. head: the node where Ray's head runs."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    detail = next(
        (line for line in lines if "its node has died" in line or "node died" in line or "exit detail" in line), ""
    )
    if "node" in detail and "exit detail" not in detail:
        return (
            f"its node was lost: Ray's head on {head} has not heard of it for longer than its health checks allow "
            "(RAY_health_check_*, where the head is started). The machine or its Ray has ended, or the link between "
            "the two nodes is cut"
        )
    return "its process was killed or crashed (a signal, or out of memory)"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
