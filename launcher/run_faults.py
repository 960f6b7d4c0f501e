"""What keeps a planned run from working: settings that contradict each other, and what this machine lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from phalanx.errors import Problem
from phalanx.launcher.kv_pool import KVPool
from phalanx.launcher.machine import Machine
from phalanx.launcher.rank_plan import RankPlan
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.schema import Config
from phalanx.launcher.sizes import format_bytes
from phalanx.models.config import DecoderConfig

BAD_CONFIGURATION = 2
CANNOT_RUN_HERE = 3

_MEMORY_SETTINGS = ("cluster.device_memory", "engine.kv_cache")
_SMALLER_NEEDS = "set a smaller model.max_length or engine.max_batch_tokens, or a larger engine.kv_cache_share"


class Fault(NamedTuple):
    """exit_code: BAD_CONFIGURATION where it fails on any machine, CANNOT_RUN_HERE where this one lacks something."""

    exit_code: int
    problem: Problem


def find_faults(config: Config, plan: RunPlan, model: DecoderConfig, machine: Machine) -> list[Fault]:
    """Everything that is known to stop `plan`, before anything is started; empty where nothing is."""
    here = not config.cluster.elsewhere
    faults = [*_length_faults(config, model), *_stated_memory_faults(config, plan)]
    if here:
        faults += [*_core_faults(config, plan, machine), *_gpu_faults(config, plan, machine)]
    if isinstance(config.engine.kv_cache, int):
        faults += _stated_pool_faults(config, plan)
        if here and plan.device == "cpu":
            faults += _memory_faults(plan, machine)
    elif not any(fault.problem.path in _MEMORY_SETTINGS for fault in faults):  # which would say it once more
        faults += _auto_pool_faults(config, plan, machine)
    return faults


def _length_faults(config: Config, model: DecoderConfig) -> Iterator[Fault]:
    asked = config.model.max_length
    if asked is not None and asked > model.max_position:
        yield _bad(
            "model.max_length", "the model cannot address so many positions", asked, f"at most {model.max_position}"
        )


def _stated_pool_faults(config: Config, plan: RunPlan) -> Iterator[Fault]:
    pool = plan.kv_pool
    if pool.num_pages < pool.least_pages:
        cost = plan.ranks[pool.tightest].kv_bytes_per_token
        needed = pool.least_pages * pool.page_size * cost
        yield _bad(
            "engine.kv_cache",
            f"too small for {_least(config, pool)}: {plan.tightest} takes {format_bytes(cost)} a token",
            f"{_kv_cache(config)}, which is {pool.num_pages * pool.page_size} tokens",
            f"at least {format_bytes(needed)} ({needed} bytes)",
            _narrow(config, pool.least_pages * pool.page_size * plan.ranks[pool.tightest].narrow_bytes_per_token),
        )


def _auto_pool_faults(config: Config, plan: RunPlan, machine: Machine) -> Iterator[Fault]:
    pool, expected = plan.kv_pool, plan.kv_pool.expected_pages
    if pool.share is None or expected is None or expected >= pool.least_pages:
        return
    what = _least(config, pool)
    too_few = f"{pool.share:g} of the rest is {expected * pool.page_size} tokens of KV cache, too few for {what}"
    least_tokens = pool.least_pages * pool.page_size
    ranks = [replace(rank, kv_bytes=0) for rank in plan.ranks]
    if pool.device_bytes is not None:
        tightest, stated = ranks[pool.tightest], config.cluster.device_memory
        needed, narrow = (
            tightest.base_bytes + math.ceil(least_tokens * a_token / pool.share)
            for a_token in (tightest.kv_bytes_per_token, tightest.narrow_bytes_per_token)
        )
        fault, path, found = _lacking, "engine.kv_cache", "auto"
        if stated is not None:
            fault, path, found = _bad, "cluster.device_memory", format_bytes(stated)
        yield fault(
            path,
            f"{tightest.place} holds {_parts(tightest)} of {format_bytes(pool.device_bytes)}; {too_few}",
            found,
            f"at least {format_bytes(needed)} a rank",
            "; ".join(filter(None, (f"use more ranks or stages, or {_SMALLER_NEEDS}", _narrow(config, narrow)))),
        )
    elif machine.free_bytes is None:
        yield _lacking(
            "engine.kv_cache",
            "this system does not say how much memory is free",
            "auto",
            "a size",
            "say what each rank may take, such as 1GiB",
        )
    else:
        copies = plan.layout.replicas
        needed, narrow = (
            copies * (sum(rank.base_bytes for rank in ranks) + math.ceil(least_tokens * a_token / pool.share))
            for a_token in (
                sum(rank.kv_bytes_per_token for rank in ranks),
                sum(rank.narrow_bytes_per_token for rank in ranks),
            )
        )
        yield _lacking(
            "engine.kv_cache",
            f"the {plan.num_ranks} ranks on this machine hold {_parts(*ranks, copies=copies)} of "
            f"{format_bytes(machine.free_bytes)} free; {too_few}",
            "auto",
            f"with at least {format_bytes(needed)} free",
            "; ".join(filter(None, (f"end what else takes memory, or {_SMALLER_NEEDS}", _narrow(config, narrow)))),
        )


def _least(config: Config, pool: KVPool) -> str:
    """What the fewest pages hold with which a rank can serve."""
    length = config.model.max_length
    return f"one sequence of model.max_length ({length} tokens)" if pool.least_pages > 1 else "one page"


def _kv_cache(config: Config) -> str:
    size = config.engine.kv_cache
    return size if isinstance(size, str) else format_bytes(size)


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
            f"{worst.place} holds {_parts(worst)}",
            f"{format_bytes(stated)}{share}",
            f"at least {format_bytes(worst.total_bytes)} a rank",
            "use more ranks or stages" + _or_smaller_pool(config),
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
            f"{worst.place} holds {_parts(worst)}; its share of a GPU has {format_bytes(limit)}",
            _kv_cache(config),
            _kv_allowed(limit - worst.base_bytes),
            "use more ranks on more GPUs" + _or_smaller_pool(config),
        )


def _memory_faults(plan: RunPlan, machine: Machine) -> Iterator[Fault]:
    copies = plan.layout.replicas
    total = copies * sum(rank.total_bytes for rank in plan.ranks)
    if machine.memory_bytes is not None and total > machine.memory_bytes:
        kv = copies * sum(rank.kv_bytes for rank in plan.ranks)
        yield _lacking(
            "engine.kv_cache",
            f"the {plan.num_ranks} ranks on this machine hold {_parts(*plan.ranks, copies=copies)}; it has "
            f"{format_bytes(machine.memory_bytes)}",
            f"{format_bytes(kv)} in all",
            f"{_kv_allowed(machine.memory_bytes - total + kv)} in all",
            "use a smaller engine.kv_cache, fewer replicas, or more machines",
        )


def _kv_allowed(spare: int) -> str:
    return f"at most {format_bytes(spare)}" if spare > 0 else "nothing: the weights alone do not fit"


def _parts(*ranks: RankPlan, copies: int = 1) -> str:
    def size(name: str) -> str:
        return format_bytes(copies * sum(getattr(rank, name) for rank in ranks))

    kv = f"KV cache {size('kv_bytes')}, " if ranks[0].kv_bytes else ""
    return f"{size('total_bytes')}: weights {size('weight_bytes')}, {kv}about {size('work_bytes')} to work in"


def _narrow(config: Config, needed_bytes: int) -> str | None:
    """What pages in 8 bits would do, where they are not yet."""
    if config.engine.kv_cache_dtype != "auto":
        return None
    return f"with engine.kv_cache_dtype: int8 {format_bytes(needed_bytes)} suffice"


def _or_smaller_pool(config: Config) -> str:
    return "" if config.engine.kv_cache == "auto" else ", or a smaller engine.kv_cache"


def _bad(path: str, message: str, found: object, allowed: str, suggestion: str | None = None) -> Fault:
    return Fault(BAD_CONFIGURATION, Problem(path, message, str(found), allowed, suggestion))


def _lacking(path: str, message: str, found: object, allowed: str, suggestion: str | None = None) -> Fault:
    return Fault(CANNOT_RUN_HERE, Problem(path, message, str(found), allowed, suggestion))
