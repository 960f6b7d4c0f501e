"""What `phalanx check` finds: the layout, the decisions, or everything that is wrong. Starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from phalanx.errors import CommError, ConfigError, LayoutError, ModelError, PhalanxError, Problem
from phalanx.launcher.config import UnsoundConfigError, load_config
from phalanx.launcher.machine import Machine, this_machine
from phalanx.launcher.run_faults import BAD_CONFIGURATION, CANNOT_RUN_HERE, Fault, find_faults
from phalanx.launcher.run_plan import Decision, RunPlan, plan_run
from phalanx.launcher.schema import Config
from phalanx.launcher.yaml_document import read_yaml
from phalanx.models.config import DecoderConfig
from phalanx.models.params import rank_params
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.layout import StageRequest, build_layout


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The outcome of a check.

    source: the file. exit_code: 0 good, 2 bad configuration, 3 cannot run here. errors: everything wrong. notes: what a
    check on this machine cannot know. model: name, or None where there is none. plan: None where there is no layout.
    model_parameters: of the model held once. decisions: what was chosen and why.
    """

    source: str
    exit_code: int = 0
    errors: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    model: str | None = None
    model_parameters: int = 0
    plan: RunPlan | None = None
    device_memory: int | None = None
    decisions: tuple[Decision, ...] = ()

    @property
    def ok(self) -> bool:
        return self.exit_code == 0

    def to_json(self) -> dict[str, Any]:
        """Plain data. Keys stay: `ok`, `exit_code`, `source`, `model`, `layout` (a list of ranks), `totals`, `choices`,
        `errors`, `notes`. Intervals are `[first, past the last]`, all sizes bytes. Where the KV cache is measured at
        start, its figures are estimates: `kv_capacity_tokens` and `kv_room_tokens` are null, and `kv_bytes` 0, where
        there is nothing to estimate by.
        """
        return {
            "ok": self.ok,
            "exit_code": self.exit_code,
            "source": self.source,
            "model": self.model,
            "layout": [] if self.plan is None else _rank_rows(self.plan),
            "totals": {} if self.plan is None else _totals(self.plan, self.model_parameters, self.device_memory),
            "choices": [decision._asdict() for decision in self.decisions],
            "errors": [asdict(problem) for problem in self.errors],
            "notes": list(self.notes),
        }


class FoundModel(Protocol):
    """What a check needs of `models.resolve.ModelSource`. kind: `shape` for a model without weights. known_entries: of
    its checkpoint, empty where it has not been fetched; raises ModelError for what is wrong with it.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def config(self) -> DecoderConfig: ...
    def known_entries(self) -> Mapping[str, TensorEntry]: ...


ModelLookup = Callable[[str, str | None], FoundModel]


def look_up_model(path: str, revision: str | None) -> FoundModel:
    """The model at `path`; only its dimensions are read, and a built-in one is fetched first. Raises ModelError."""
    from phalanx.models.resolve import resolve_model

    return resolve_model(path, revision=revision)


def check(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    machine: Machine | None = None,
    look_up: ModelLookup = look_up_model,
) -> CheckReport:
    """Checks a configuration as `load_config` takes it. What is wrong is in the report, not raised.

    machine: what to check against; None looks at this one.
    """
    report = CheckReport("configuration" if isinstance(source, Mapping) else str(source))
    problems: tuple[Problem, ...] = ()
    try:
        config = load_config(source, overrides)
    except UnsoundConfigError as error:  # what is sound of it may have more that is wrong
        problems, config = error.problems, error.sound
    except ConfigError as error:
        return replace(report, exit_code=BAD_CONFIGURATION, errors=error.problems)
    try:
        found = look_up(config.model.path, config.model.revision)
    except ModelError as error:
        problem = Problem("model.path", str(error), config.model.path)
        exit_code = BAD_CONFIGURATION if problems else CANNOT_RUN_HERE
        return replace(report, exit_code=exit_code, errors=(*problems, problem))
    model = found.config
    try:
        entries = found.known_entries()
    except ModelError as error:
        problem = Problem("model.path", str(error), config.model.path)
        exit_code = BAD_CONFIGURATION if problems else CANNOT_RUN_HERE
        return replace(report, exit_code=exit_code, errors=(*problems, problem), model=found.name)
    machine = machine or this_machine()
    lines = {} if isinstance(source, Mapping) else read_yaml(Path(source)).lines
    overridden = {override.partition("=")[0].strip() for override in overrides}

    def with_line(problem: Problem) -> Problem:
        line = lines.get(tuple(problem.path.split(".")))
        return problem if problem.path in overridden else replace(problem, line=line)

    try:
        plan = plan_run(config, model, machine, entries)
    except LayoutError as error:
        problem = with_line(Problem("parallel", str(error)))
        return replace(report, exit_code=BAD_CONFIGURATION, errors=(*problems, problem), model=found.name)
    faults, comm = review(config, plan, model, machine)
    errors = (*problems, *(with_line(fault.problem) for fault in faults))
    if problems:
        return replace(report, exit_code=BAD_CONFIGURATION, errors=errors, model=found.name)
    return replace(
        report,
        exit_code=min((fault.exit_code for fault in faults), default=0),
        errors=errors,
        notes=tuple(_notes(config, plan, found)),
        model=found.name,
        model_parameters=_num_parameters(model),
        plan=plan,
        device_memory=config.cluster.device_memory,
        decisions=(*plan.decisions, *comm),
    )


def review(
    config: Config, plan: RunPlan, model: DecoderConfig, machine: Machine
) -> tuple[list[Fault], tuple[Decision, ...]]:
    """Everything that is known to stop a run before it is started, and the communicators it would take."""
    faults = find_faults(config, plan, model, machine)
    try:
        return faults, _comm_decisions(plan, machine, config.cluster.elsewhere)
    except PhalanxError as error:
        problem = Problem("comm.backend", str(error), config.comm.backend)
        return [*faults, Fault(BAD_CONFIGURATION, problem)], ()


def _num_parameters(model: DecoderConfig) -> int:
    single = build_layout(model.shape, [StageRequest()])
    return sum(param.num_elements for param in rank_params(model, single, next(single.places())))


def _comm_decisions(plan: RunPlan, machine: Machine, elsewhere: bool) -> tuple[Decision, ...]:
    """The communicator of each group of ranks, one line for groups of the same size. Raises CommError for none."""
    groups: dict[int, list[str]] = {}
    for stage in plan.layout.stages:
        groups.setdefault(stage.num_ranks, []).append(str(stage.index))
    decisions = [
        _comm_decision(
            f"comm in stage{'s' if len(stages) > 1 else ''} {', '.join(stages)}", size, plan, machine, elsewhere
        )
        for size, stages in groups.items()
    ]
    if len(plan.layout.stages) > 1:
        decisions.append(_comm_decision("comm between stages", plan.layout.num_ranks, plan, machine, elsewhere))
    return tuple(decisions)


def _comm_decision(name: str, size: int, plan: RunPlan, machine: Machine, elsewhere: bool) -> Decision:
    from phalanx.comm.create import choose_backend

    # Whether NCCL serves can only be asked where there is a GPU; the ranks ask again where they are.
    if plan.device == "cuda" and not machine.gpus and size > 1 and plan.backend in ("auto", "nccl"):
        return Decision(name, plan.backend, "no GPU here to ask; the ranks take NCCL where it serves them")
    together = choose_backend(plan.backend, plan.device, size)
    if not elsewhere:
        return Decision(name, *together)
    # Which machines the ranks will be on is known when they meet.
    where: dict[str, Any] = {"apart": "ranks on several machines", "machines": range(size)}
    try:
        apart = choose_backend(plan.backend, plan.device, size, **where)
    except CommError:
        return Decision(name, together.name, f"{together.reason}; refused where its ranks are on several machines")
    if apart.name == together.name:
        return Decision(name, *apart)
    words = f"{together.name} where its ranks are all on one machine ({together.reason}), else {apart.name}"
    return Decision(name, f"{together.name} or {apart.name}", f"{words} ({apart.reason})")


def _notes(config: Config, plan: RunPlan, found: FoundModel) -> Iterator[str]:
    cluster = config.cluster
    if found.kind == "shape":
        yield f"{found.name} has no weights: it can be checked, not run"
    if not cluster.elsewhere:
        return
    yield f"cluster.ray is {cluster.ray}: what that cluster has is seen when the ranks are placed"
    if cluster.device_memory is None:
        yield "cluster.device_memory is not given: whether the ranks fit their devices is not proved"
    if cluster.device == "auto":
        yield f"cluster.device is auto: taken for {plan.device}; say cpu or cuda to be sure"


def _rank_rows(plan: RunPlan) -> list[dict[str, Any]]:
    rows, rooms = [], plan.kv_pool.rooms
    for replica in range(plan.layout.replicas):
        for rank in plan.ranks:
            stage = plan.layout.stages[rank.place.stage]
            part = rank.place.tensor_rank
            has_vocab = stage.first or stage.last
            rows.append(
                {
                    "replica": replica,
                    "stage": stage.index,
                    "rank": rank.place.rank,
                    "tensor_rank": part,
                    "node": stage.node,
                    "accelerator": stage.accelerator,
                    "layers": list(stage.layers),
                    "query_heads": list(stage.query_heads[part]),
                    "kv_heads": list(stage.kv_heads[part]),
                    "ffn_columns": list(stage.ffn[part]),
                    "vocab_rows": list(stage.vocab[part]) if has_vocab else None,
                    "head_rows": list(stage.head[part]) if stage.head else None,
                    "parameters": rank.parameters,
                    "weight_bytes": rank.weight_bytes,
                    "cut_bytes": rank.cut_bytes,
                    "kv_bytes_per_token": rank.kv_bytes_per_token,
                    "kv_bytes": rank.kv_bytes,
                    "kv_room_tokens": None if rooms is None else rooms[rank.place.rank] * plan.page_size,
                    "work_bytes": rank.work_bytes,
                    "total_bytes": rank.total_bytes,
                }
            )
    return rows


def _totals(plan: RunPlan, model_parameters: int, device_memory: int | None) -> dict[str, Any]:
    replicas, capacity = plan.layout.replicas, plan.kv_capacity_tokens
    largest = max(plan.ranks, key=lambda rank: rank.total_bytes)
    return {
        "replicas": replicas,
        "stages": len(plan.layout.stages),
        "ranks": plan.num_ranks,
        "model_parameters": model_parameters,
        "parameters": replicas * sum(rank.parameters for rank in plan.ranks),
        "weight_bytes": replicas * sum(rank.weight_bytes for rank in plan.ranks),
        "kv_bytes": replicas * sum(rank.kv_bytes for rank in plan.ranks),
        "kv_bytes_per_token": sum(rank.kv_bytes_per_token for rank in plan.ranks),
        "kv_capacity_tokens": None if capacity is None else replicas * capacity,
        "kv_measured_at_start": plan.kv_pool.measured,
        "kv_tightest_rank": plan.tightest.rank,
        "kv_tightest_stage": plan.tightest.stage,
        "kv_tightest_node": plan.layout.stages[plan.tightest.stage].node,
        "max_length": plan.max_length,
        "largest_rank": largest.place.rank,
        "largest_rank_bytes": largest.total_bytes,
        "device_memory": device_memory,
    }
