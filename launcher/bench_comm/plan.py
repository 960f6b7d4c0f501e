"""From a configuration to what is to be measured, before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from phalanx.engine.messages import RankSpec
from phalanx.errors import ConfigError, RequestError
from phalanx.launcher.bench_comm.groups import OPS, CommGroup, Op, layout_groups
from phalanx.launcher.check import review
from phalanx.launcher.hosts import ClusterSettings
from phalanx.launcher.machine import this_machine
from phalanx.launcher.run_plan import RunPlan, plan_run
from phalanx.launcher.schema import Config
from phalanx.launcher.sizes import parse_size
from phalanx.launcher.specs import cluster_settings, rank_specs
from phalanx.models.resolve import resolve_model

MEMORY_FAULTS = ("engine.", "model.", "cluster.device_memory")  # of no concern where no weights are loaded


@dataclass(frozen=True, slots=True)
class CommPlan:
    """specs: of the ranks of the first replica; the others are like it."""

    run: RunPlan
    hidden_size: int
    settings: ClusterSettings
    specs: list[RankSpec]
    groups: list[CommGroup]


def plan_comm(config: Config, ops: Sequence[Op]) -> CommPlan:
    """What is measured for a configuration. Only the model's dimensions are read, so `shape:NAME` serves too.

    Raises ConfigError and ModelError as a start would, but for memory; RequestError where there is nothing to measure.
    """
    source = resolve_model(config.model.path, revision=config.model.revision)
    machine = this_machine()
    plan = plan_run(config, source.config, machine)
    faults, _ = review(config, plan, source.config, machine)
    problems = [fault.problem for fault in faults if not fault.problem.path.startswith(MEMORY_FAULTS)]
    if problems:
        raise ConfigError(problems, config.model.path)
    groups = layout_groups(plan.layout, ops)
    if not groups:
        raise RequestError(
            f"nothing is transferred in {plan.layout} by {', '.join(ops)}: ask for a layout of several ranks (--set "
            "parallel.tensor=2, or parallel.pipeline=2, which has send_recv alone)"
        )
    return CommPlan(
        plan,
        source.config.shape.hidden_size,
        cluster_settings(config, plan, apart=True),
        rank_specs(config, plan, source.config, None, replica=0),
        groups,
    )


def parse_ops(text: str) -> tuple[Op, ...]:
    """Operations in a list with commas. Raises RequestError."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in OPS]
    if unknown:
        raise RequestError(f"{unknown[0]!r} is no operation; known: {', '.join(OPS)}")
    return cast("tuple[Op, ...]", tuple(dict.fromkeys(names)))


def parse_sizes(text: str) -> tuple[int, ...]:
    """Bytes in a list with commas, such as `8KiB,1MiB`, smallest first. Raises RequestError."""
    try:
        return tuple(sorted({parse_size(part.strip()) for part in text.split(",")}))
    except ValueError as error:
        raise RequestError(f"--sizes: {error}") from None
