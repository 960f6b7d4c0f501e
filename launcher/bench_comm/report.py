"""What a run of `phalanx bench comm` found, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from phalanx.launcher.bench.figures import Spread
from phalanx.launcher.bench.report import machine_facts, model_name
from phalanx.launcher.bench_comm.limits import Limits
from phalanx.launcher.bench_comm.measure import CommOptions, GroupResult, SizeResult
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.schema import Config

RIVAL = "gloo"  # what every backend is compared with


@dataclass(frozen=True, slots=True)
class CommReport:
    """command: as it can be typed elsewhere. nodes: of each rank."""

    command: str
    config: Config
    plan: RunPlan
    options: CommOptions
    nodes: Mapping[int, str]
    groups: Sequence[GroupResult]

    def to_json(self) -> dict[str, Any]:
        """Plain data; names say the units. Bytes a second are those of the longer tensor over the median time."""
        return {
            "benchmark": "phalanx bench comm",
            "command": self.command,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "config": {
                "model": model_name(self.config),
                "dtype": self.plan.dtype,
                "device": self.plan.device,
                "layout": str(self.plan.layout),
                "backend": self.config.comm.backend,
                "threads_per_rank": 1,
            },
            "machine": machine_facts(),
            "nodes": {str(rank): node for rank, node in self.nodes.items()},
            "rounds": self.options.num_rounds,
            "groups": [_group(found) for found in self.groups],
        }


def gain(size: SizeResult, backend: str) -> float | None:
    """How many times as long the rival takes; None where it was not measured."""
    return size.median_s(RIVAL) / size.median_s(backend) if RIVAL in size.readings_s else None


def _group(found: GroupResult) -> dict[str, Any]:
    return {
        "name": found.group.name,
        "ranks": list(found.group.ranks),
        "send_recv_between": [found.group.ranks[number] for number in found.group.pair],
        "backends": [
            {"name": name, "reason": reason, "chosen": name == found.chosen} for name, reason in found.backends
        ],
        "refused": found.refused,
        "limits": _limits(found.limits),
        "results": [_size(size) for size in found.sizes],
    }


def _limits(limits: Limits) -> dict[str, Any]:
    word = limits.word
    return {
        "machines": list(limits.machines),
        "core_to_core_us": word and word.way_s * 1e6,
        "core_to_core_with_interpreter_us": word and word.seen_s * 1e6,
        "copy_one_rank_bytes_per_s": limits.copy_one_bytes_per_s,
        "copy_all_ranks_bytes_per_s": limits.copy_all_bytes_per_s,
        "tcp": [
            {"between": link.between, "bytes_per_s": link.bytes_per_s, "one_way_us": link.one_way_s * 1e6}
            for link in limits.links
        ],
    }


def _size(size: SizeResult) -> dict[str, Any]:
    backends = {}
    for name, readings in size.readings_s.items():
        spread = Spread.over(reading * 1e6 for reading in readings)
        assert spread is not None
        backends[name] = {
            "us": spread._asdict(),
            "bytes_per_s": size.num_bytes / size.median_s(name),
            "readings_us": [reading * 1e6 for reading in readings],
        }
    limit_us = None if size.limit_s is None else size.limit_s * 1e6
    return {"op": size.op, "num_bytes": size.num_bytes, "limit_us": limit_us, "backends": backends}
