"""What keeps a planned run from working: settings that contradict each other, and what this machine lacks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from phalanx.errors import Problem
from phalanx.launcher.machine import Machine
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.schema import Config
from phalanx.launcher.sizes import format_bytes
from phalanx.models.config import DecoderConfig

BAD_CONFIGURATION = 2
CANNOT_RUN_HERE = 3


class Fault(NamedTuple):
    """exit_code: BAD_CONFIGURATION where it fails on any machine, CANNOT_RUN_HERE where this one lacks something."""

    exit_code: int
    problem: Problem


def find_faults(config: Config, plan: RunPlan, model: DecoderConfig, machine: Machine) -> list[Fault]:
    """Everything that is known to stop `plan`, before anything is started; empty where nothing is."""
    faults = [*_length_faults(config, plan, model), *_stated_memory_faults(config, plan)]
    if not config.cluster.elsewhere:
        faults += [*_core_faults(config, plan, machine), *_gpu_faults(config, plan, machine)]
        if plan.device == "cpu":
            faults += _memory_faults(plan, machine)
    return faults


def _length_faults(config: Config, plan: RunPlan, model: DecoderConfig) -> Iterator[Fault]:
    asked = config.model.max_length
    if asked is not None and asked > model.max_position:
        yield _bad(
            "model.max_length", "the model cannot address so many positions", asked, f"at most {model.max_position}"
        )
    cost = plan.ranks[plan.tightest.rank].kv_bytes_per_token
    needed = asked if asked is not None and asked <= model.max_position else 1
    if plan.kv_capacity_tokens < needed:
        pages = -(-needed // plan.page_size)
        what = f"one sequence of model.max_length ({needed} tokens)" if needed > 1 else "one page"
        yield _bad(
            "engine.kv_cache",
            f"too small for {what}: {plan.tightest} takes {format_bytes(cost)} a token",
            f"{format_bytes(config.engine.kv_cache)}, which is {plan.kv_capacity_tokens} tokens",
            f"at least {format_bytes(pages * plan.page_size * cost)} ({pages * plan.page_size * cost} bytes)",
        )


def _stated_memory_faults(config: Config, plan: RunPlan) -> Iterator[Fault]:
    stated = config.cluster.device_memory
    if stated is None:
        return
    limit = int(stated * plan.gpus_per_rank) if plan.device == "cuda" else stated
    worst = max(plan.ranks, key=lambda rank: rank.total_bytes)
    if worst.total_bytes > limit:
        share = f" x cluster.gpus_per_rank {plan.gpus_per_rank:g}" if limit != stated else ""
        yield _bad(
            "cluster.device_memory",
            f"{worst.place} holds {_parts(worst.weight_bytes, worst.kv_bytes, worst.work_bytes)}",
            f"{format_bytes(stated)}{share}",
            f"at least {format_bytes(worst.total_bytes)} a rank",
            "use more ranks or stages, or a smaller engine.kv_cache",
        )


def _core_faults(config: Config, plan: RunPlan, machine: Machine) -> Iterator[Fault]:
    wanted = plan.num_ranks * plan.cpus_per_rank
    # Ray places by these figures; plain processes only share the cores, which is slow but works.
    if config.cluster.ray == "local" and wanted > machine.num_cores * (1 + 1e-6):
        yield _lacking(
            "cluster.cpus_per_rank",
            f"{plan.num_ranks} ranks take {wanted:g} cores, this machine has {machine.num_cores}",
            f"{plan.cpus_per_rank:g}",
            f"at most {int(machine.num_cores / plan.num_ranks * 1e4) / 1e4:g}",
            "leave it out to deal the cores evenly",
        )


def _gpu_faults(config: Config, plan: RunPlan, machine: Machine) -> Iterator[Fault]:
    if plan.device != "cuda":
        return
    if not machine.gpus:
        yield _lacking(
            "cluster.device",
            "PyTorch sees no GPU on this machine",
            config.cluster.device,
            "cpu",
            "set cluster.device: cpu; or cluster.ray: auto or host:port for a cluster that has GPUs",
        )
        return
    ranks_each = int(1 / plan.gpus_per_rank + 1e-6)
    if ranks_each * len(machine.gpus) < plan.num_ranks:
        yield _lacking(
            "cluster.gpus_per_rank",
            f"{plan.num_ranks} ranks at {plan.gpus_per_rank:g} GPU each do not go on {len(machine.gpus)} GPUs",
            f"{plan.gpus_per_rank:g}",
            f"at most {int(1e4 / -(-plan.num_ranks // len(machine.gpus))) / 1e4:g}",
            "use fewer ranks, or let several share a GPU",
        )
    smallest = min(gpu.memory_bytes for gpu in machine.gpus)
    worst = max(plan.ranks, key=lambda rank: rank.total_bytes)
    limit = int(smallest * plan.gpus_per_rank)
    if worst.total_bytes > limit:
        yield _lacking(
            "engine.kv_cache",
            f"{worst.place} holds {_parts(worst.weight_bytes, worst.kv_bytes, worst.work_bytes)}; its share of a GPU "
            f"has {format_bytes(limit)}",
            format_bytes(config.engine.kv_cache),
            _kv_allowed(limit - worst.weight_bytes - worst.work_bytes),
            "use more ranks on more GPUs, or a smaller engine.kv_cache",
        )


def _memory_faults(plan: RunPlan, machine: Machine) -> Iterator[Fault]:
    copies = plan.layout.replicas
    weights = copies * sum(rank.weight_bytes for rank in plan.ranks)
    kv = copies * sum(rank.kv_bytes for rank in plan.ranks)
    work = copies * sum(rank.work_bytes for rank in plan.ranks)
    if machine.memory_bytes is not None and weights + kv + work > machine.memory_bytes:
        spare = machine.memory_bytes - weights - work
        yield _lacking(
            "engine.kv_cache",
            f"the {plan.num_ranks} ranks on this machine hold {_parts(weights, kv, work)}; it has "
            f"{format_bytes(machine.memory_bytes)}",
            f"{format_bytes(kv)} in all",
            f"{_kv_allowed(spare)} in all",
            "use a smaller engine.kv_cache, fewer replicas, or more machines",
        )


def _kv_allowed(spare: int) -> str:
    return f"at most {format_bytes(spare)}" if spare > 0 else "nothing: the weights alone do not fit"


def _parts(weights: int, kv: int, work: int) -> str:
    total = format_bytes(weights + kv + work)
    return (
        f"{total}: weights {format_bytes(weights)}, KV cache {format_bytes(kv)}, about {format_bytes(work)} to work in"
    )


def _bad(path: str, message: str, found: object, allowed: str, suggestion: str | None = None) -> Fault:
    return Fault(BAD_CONFIGURATION, Problem(path, message, str(found), allowed, suggestion))


def _lacking(path: str, message: str, found: object, allowed: str, suggestion: str | None = None) -> Fault:
    return Fault(CANNOT_RUN_HERE, Problem(path, message, str(found), allowed, suggestion))
