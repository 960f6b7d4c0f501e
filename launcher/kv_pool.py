"""How many pages the KV cache of a run gets, or how its ranks are to find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from phalanx.engine.kv_budget import page_size_on, pages_within
from phalanx.launcher.machine import Machine
from phalanx.launcher.rank_plan import RankPlan
from phalanx.launcher.schema import Config
from phalanx.launcher.sizes import format_bytes
from phalanx.models.config import DecoderConfig

GPU_SHARE = 0.9  # the rest is for what a warm-up does not show: fragments, workspaces of libraries, longer contexts
CPU_SHARE = 0.3  # the rest is for every rank's interpreter (some 0.2 GB), cached files and whatever else runs there


@dataclass(frozen=True, slots=True)
class KVPool:
    """The pages of a replica's KV cache: the same number on every rank, because ranks share page tables.

    page_size: tokens a page. num_pages: how many; 0 where `measured`: each rank then measures once it is loaded and
    warm, and what fits the tightest is what all take. share: of the memory that weights and work leave free; None for a
    stated size. device_bytes: memory of one rank's own device where that bounds the pool, else None. rooms: pages that
    each rank has room for, ranks of one machine in as much of its memory as the tightest takes; None where nothing
    says. tightest: number of the rank with the least room. least_pages: a rank with room for fewer cannot serve.
    limit_pages: most that a rank which measures takes.
    """

    page_size: int
    num_pages: int
    measured: bool
    share: float | None
    device_bytes: int | None
    rooms: tuple[int, ...] | None
    tightest: int
    least_pages: int
    limit_pages: int

    @property
    def expected_pages(self) -> int | None:
        """`num_pages`; where they are measured an estimate of them, None where there is nothing to estimate by."""
        if not self.measured:
            return self.num_pages
        return None if self.rooms is None else min(*self.rooms, self.limit_pages)


def plan_kv_pool(
    config: Config,
    model: DecoderConfig,
    machine: Machine,
    device: str,
    gpus_per_rank: float,
    ranks: Sequence[RankPlan],
    replicas: int,
) -> tuple[KVPool, str, str]:
    """The pool, and in words its size and the reason. ranks: of one replica, still without pages."""
    engine, asked = config.engine, config.model.max_length
    page_size, share, measured = engine.page_size or page_size_on(device), None, False
    costs = [rank.kv_bytes_per_token * page_size for rank in ranks]
    limit_pages = engine.max_sequences * -(-(asked or model.max_position) // page_size)
    device_bytes: int | None = None
    rooms: list[int] | None = None
    if isinstance(engine.kv_cache, int):
        rooms = [engine.kv_cache // cost for cost in costs]
        num_pages = min(rooms)
    else:
        share = engine.kv_cache_share or (GPU_SHARE if device == "cuda" else CPU_SHARE)
        measured = device == "cuda" or config.cluster.elsewhere
        device_bytes = _device_bytes(config, machine, device, gpus_per_rank)
        if device_bytes is not None:
            spare = [device_bytes - rank.base_bytes for rank in ranks]
            rooms = [pages_within(each, share, cost) for each, cost in zip(spare, costs, strict=True)]
        if measured:
            num_pages = 0
            if rooms is not None and device == "cpu":  # there the figure is what a rank may use, not what it finds
                limit_pages = min(limit_pages, *rooms)
        else:
            fitting = pages_within(_host_spare_bytes(machine, ranks, replicas), share, replicas * sum(costs))
            shared = [fitting * max(costs) // cost for cost in costs]
            if rooms is None or fitting <= min(rooms):
                device_bytes = None
            rooms = shared if rooms is None else list(map(min, rooms, shared))
            num_pages = min(*rooms, limit_pages)
    pool = KVPool(
        page_size=page_size,
        num_pages=num_pages,
        measured=measured,
        share=share,
        device_bytes=device_bytes,
        rooms=None if rooms is None else tuple(rooms),
        tightest=min(range(len(ranks)), key=lambda rank: (rooms[rank] if rooms else 0, -costs[rank])),
        least_pages=1 if asked is None or asked > model.max_position else -(-asked // page_size),
        limit_pages=limit_pages,
    )
    choice = "measured at start" if measured else f"{num_pages} pages of {page_size} tokens"
    return pool, choice, _reason(pool, config, machine, ranks, replicas)


def _host_spare_bytes(machine: Machine, ranks: Sequence[RankPlan], replicas: int) -> int:
    """What weights and work of all ranks leave of the memory that is free on this machine; below 0 where it is short,
    and where nothing says what is free.
    """
    return (machine.free_bytes or 0) - replicas * sum(rank.base_bytes for rank in ranks)


def _device_bytes(config: Config, machine: Machine, device: str, gpus_per_rank: float) -> int | None:
    stated = config.cluster.device_memory
    if device == "cpu":
        return stated
    if stated is None and machine.gpus and not config.cluster.elsewhere:
        stated = min(gpu.memory_bytes for gpu in machine.gpus)
    return None if stated is None else int(stated * gpus_per_rank)


def _reason(pool: KVPool, config: Config, machine: Machine, ranks: Sequence[RankPlan], replicas: int) -> str:
    tightest = ranks[pool.tightest]
    if isinstance(config.engine.kv_cache, int):
        cost = format_bytes(tightest.kv_bytes_per_token)
        return f"{format_bytes(config.engine.kv_cache)} a rank, {cost} a token on rank {pool.tightest}"
    if pool.measured:
        reason = f"{pool.share:g} of what a rank finds free for it once loaded and warm; the tightest decides"
        expected = pool.expected_pages
        return reason if expected is None else f"{reason}; estimated at {expected * pool.page_size} tokens"
    tokens = f"{pool.num_pages * pool.page_size} tokens"
    if pool.num_pages == pool.limit_pages:
        return f"{tokens}, all that {config.engine.max_sequences} sequences of the longest can use"
    if machine.free_bytes is None:
        return "this system does not say how much memory is free"
    if pool.device_bytes is not None:
        spare = pool.device_bytes - tightest.base_bytes
        owner = f"cluster.device_memory, {format_bytes(pool.device_bytes)}, on rank {pool.tightest}"
    else:
        spare = _host_spare_bytes(machine, ranks, replicas)
        owner = f"the {format_bytes(machine.free_bytes)} free here"
    left = format_bytes(max(0, spare))
    return f"{tokens}: {pool.share:g} of the {left} that weights and work leave of {owner}"
