from __future__ import annotations

import re
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import Problem
from phalanx.launcher.check import CheckReport, check
from phalanx.launcher.kv_pool import KVPool
from phalanx.launcher.machine import Gpu, Machine
from phalanx.launcher.run_plan import RunPlan
from phalanx.launcher.sizes import parse_size
from phalanx.models.config import DecoderConfig, RopeConfig
from phalanx.models.tensor_entry import TensorEntry
from phalanx.parallel.shape import ModelShape

MIB, GIB = 2**20, 2**30
PAGE_SIZE = 16

SMALL = DecoderConfig(
    "llama", ModelShape(576, 30, 9, 3, 64, 1536, 49152), 8192, 1e-5, RopeConfig(), tie_embeddings=True
)
TOKEN_BYTES = 30 * 3 * 64 * 2 * 2  # keys and values of 30 layers of 3 heads of 64, in bfloat16

LAPTOP = Machine(num_cores=2, memory_bytes=8 * GIB, free_bytes=6 * GIB, bfloat16=True)
ONE_GPU = replace(LAPTOP, gpus=(Gpu("H100", 80 * GIB),))
# Three ranks of 20 layers that hold 2, 2 and 1 KV heads, and one of 10 layers with all three.
RAGGED = "parallel.stages=[{layers: 20, tensor: 3, weights: [2, 1, 1]}, {layers: 10}]"


@dataclass(frozen=True)
class Found:
    name: str
    config: DecoderConfig
    kind: str = "safetensors"

    def known_entries(self) -> dict[str, TensorEntry]:
        return {}


def checked(*overrides: str, machine: Machine = LAPTOP) -> CheckReport:
    return check({"model": "small"}, overrides, machine=machine, look_up=lambda name, _: Found(name, SMALL))


def planned(*overrides: str, machine: Machine = LAPTOP) -> RunPlan:
    report = checked(*overrides, machine=machine)
    assert report.errors == ()
    assert report.plan is not None
    return report.plan


def pool_of(*overrides: str, machine: Machine = LAPTOP) -> KVPool:
    return planned(*overrides, machine=machine).kv_pool


def reason(report: CheckReport) -> tuple[str, str]:
    (found,) = [(decision.choice, decision.reason) for decision in report.decisions if decision.name == "KV cache"]
    return found


def problem(*overrides: str, machine: Machine = LAPTOP) -> Problem:
    (found,) = checked(*overrides, machine=machine).errors
    return found


# On the CPUs of this machine


@given(
    free=st.integers(4 * GIB, 2**38),
    share=st.floats(0.05, 1.0),
    replicas=st.integers(1, 3),
    layout=st.sampled_from([RAGGED, "parallel.tensor=1", "parallel.tensor=2", "parallel.pipeline=4"]),
)
def test_all_ranks_of_all_replicas_share_what_is_free(free: int, share: float, replicas: int, layout: str) -> None:
    overrides = (layout, f"parallel.replicas={replicas}", f"engine.kv_cache_share={share}", "engine.max_sequences=1024")
    plan = planned(*overrides, machine=replace(LAPTOP, free_bytes=free))
    spare = free - replicas * sum(rank.weight_bytes + rank.work_bytes for rank in plan.ranks)
    a_page = replicas * PAGE_SIZE * sum(rank.kv_bytes_per_token for rank in plan.ranks)
    taken = replicas * sum(rank.kv_bytes for rank in plan.ranks)
    assert taken == plan.num_pages * a_page
    assert taken <= spare * share < taken + a_page + 1 or plan.num_pages == plan.kv_pool.limit_pages


def test_a_share_of_the_free_memory_is_taken_unasked() -> None:
    plan = planned()
    (rank,) = plan.ranks
    assert plan.num_pages == int(0.3 * (6 * GIB - rank.weight_bytes - rank.work_bytes)) // (PAGE_SIZE * TOKEN_BYTES)


def test_no_more_is_taken_than_the_longest_sequences_can_use() -> None:
    pool = pool_of("engine.max_sequences=2", "model.max_length=100")
    assert pool.num_pages == pool.limit_pages == 2 * 7
    assert reason(checked("engine.max_sequences=2", "model.max_length=100"))[1].startswith("224 tokens, all that 2 ")


def test_the_decision_says_the_share_and_of_what() -> None:
    choice, why = reason(checked())
    num_pages = int(choice.split()[0])
    assert choice == f"{num_pages} pages of 16 tokens"
    assert why == f"{num_pages * 16} tokens: 0.3 of the 5.71 GiB that weights and work leave of the 6 GiB free here"


def test_stated_memory_of_a_rank_bounds_its_share() -> None:
    free = pool_of()
    stated = planned("cluster.device_memory=1GiB")
    (rank,) = stated.ranks
    assert stated.num_pages < free.num_pages
    assert stated.num_pages == int(0.3 * (GIB - rank.weight_bytes - rank.work_bytes)) // (PAGE_SIZE * TOKEN_BYTES)
    assert "cluster.device_memory, 1 GiB" in reason(checked("cluster.device_memory=1GiB"))[1]


def test_stated_memory_above_what_is_free_bounds_nothing() -> None:
    assert pool_of("cluster.device_memory=100GiB") == pool_of()


def test_the_longest_sequence_is_what_the_pool_holds() -> None:
    small = planned(machine=replace(LAPTOP, free_bytes=500 * MIB))
    assert small.max_length == small.kv_capacity_tokens
    assert 0 < small.max_length < SMALL.max_position


# A stated size


def test_a_stated_size_is_for_each_rank_and_not_bounded_by_use() -> None:
    pool = pool_of("engine.kv_cache=64MiB", "engine.max_sequences=1", "model.max_length=16")
    assert (pool.num_pages, pool.share) == (64 * MIB // (PAGE_SIZE * TOKEN_BYTES), None)


def test_a_stated_size_is_taken_whatever_is_free() -> None:
    assert pool_of("engine.kv_cache=64MiB", machine=replace(LAPTOP, free_bytes=None)).num_pages > 0


# On GPUs and elsewhere


@pytest.mark.parametrize(
    ("overrides", "machine", "share"),
    [
        ([], ONE_GPU, 0.9),
        (["cluster.ray=auto", "cluster.device=cuda"], LAPTOP, 0.9),
        (["cluster.ray=auto", "cluster.device=cpu"], LAPTOP, 0.3),
        (["cluster.ray=auto", "cluster.device=cpu", "engine.kv_cache_share=0.5"], LAPTOP, 0.5),
    ],
)
def test_ranks_measure_on_gpus_and_elsewhere(overrides: list[str], machine: Machine, share: float) -> None:
    plan = planned(*overrides, machine=machine)
    assert (plan.num_pages, plan.kv_pool.measured, plan.kv_pool.share) == (0, True, share)
    assert plan.max_length == SMALL.max_position
    choice, why = reason(checked(*overrides, machine=machine))
    assert choice == "measured at start"
    assert why.startswith(f"{share:g} of ")


def test_pages_are_of_whole_tiles_on_gpus_unless_their_size_is_stated() -> None:
    assert (pool_of().page_size, pool_of(machine=ONE_GPU).page_size) == (16, 64)
    assert pool_of("engine.page_size=32", machine=ONE_GPU).page_size == 32


def test_a_stated_size_is_not_measured_anywhere() -> None:
    pool = pool_of("cluster.ray=auto", "cluster.device=cuda", "engine.kv_cache=64MiB")
    assert not pool.measured
    assert pool.num_pages > 0


def test_nothing_is_known_of_devices_elsewhere() -> None:
    report = checked("cluster.ray=auto", "cluster.device=cuda").to_json()
    assert report["ok"]
    assert report["totals"]["kv_measured_at_start"] is True
    assert report["totals"]["kv_capacity_tokens"] is None
    assert [(rank["kv_room_tokens"], rank["kv_bytes"]) for rank in report["layout"]] == [(None, 0)]


@pytest.mark.parametrize(
    ("overrides", "machine", "device_bytes"),
    [
        (["cluster.ray=auto", "cluster.device=cuda", "cluster.device_memory=10GiB"], LAPTOP, 10 * GIB),
        (["cluster.ray=auto", "cluster.device=cpu", "cluster.device_memory=10GiB"], LAPTOP, 10 * GIB),
        (
            ["cluster.ray=auto", "cluster.gpus_per_rank=0.5", "cluster.device_memory=10GiB"],
            LAPTOP,
            5 * GIB,
        ),
        (["parallel.replicas=2"], ONE_GPU, 40 * GIB),
    ],
)
def test_stated_or_seen_device_memory_gives_an_estimate(
    overrides: list[str], machine: Machine, device_bytes: int
) -> None:
    plan = planned(*overrides, "engine.max_sequences=1024", machine=machine)
    (rank,) = plan.ranks
    share = plan.kv_pool.share
    assert share is not None
    spare = device_bytes - rank.weight_bytes - rank.work_bytes
    page_size = 16 if "cluster.device=cpu" in overrides else 64
    pages = min(int(share * spare) // (page_size * TOKEN_BYTES), 1024 * 8192 // page_size)
    assert (plan.num_pages, plan.kv_pool.expected_pages) == (0, pages)
    assert plan.kv_capacity_tokens == pages * page_size
    assert rank.kv_bytes == pages * page_size * TOKEN_BYTES


def test_ranks_on_cpus_elsewhere_measure_no_more_than_they_may_use() -> None:
    elsewhere = ("cluster.ray=auto", "cluster.device_memory=1GiB")
    cpu = pool_of(*elsewhere, "cluster.device=cpu")
    gpu = pool_of(*elsewhere, "cluster.device=cuda", "cluster.device_memory=10GiB")
    assert cpu.limit_pages == cpu.expected_pages
    assert gpu.limit_pages == 64 * 8192 // 64


# The tightest rank


def test_the_rank_with_most_bytes_a_token_is_the_tightest_of_ranks_that_share_memory() -> None:
    report = checked(RAGGED).to_json()
    totals, ranks = report["totals"], report["layout"]
    assert (totals["kv_tightest_rank"], totals["kv_tightest_stage"], totals["kv_tightest_node"]) == (0, 0, None)
    # As many bytes hold twice the tokens of one KV head as of two, and 4/3 of them in 10 layers of three.
    rooms = [rank["kv_room_tokens"] / totals["kv_capacity_tokens"] for rank in ranks]
    assert rooms == pytest.approx([1, 1, 2, 4 / 3], rel=1e-3)


def test_the_tightest_of_ranks_with_devices_of_their_own_is_the_one_with_least_room() -> None:
    # Both hold as much a token, but the second also the head: with little memory beside its weights it is the tighter.
    stages = "parallel.stages=[{layers: 15, node: a}, {layers: 15, node: b}]"
    elsewhere = ("cluster.ray=auto", "cluster.device=cpu", stages)
    by_cost = checked(*elsewhere).to_json()["totals"]
    by_room = checked(*elsewhere, "cluster.device_memory=300MiB").to_json()["totals"]
    assert (by_cost["kv_tightest_rank"], by_cost["kv_tightest_node"]) == (0, "a")
    assert (by_room["kv_tightest_rank"], by_room["kv_tightest_stage"], by_room["kv_tightest_node"]) == (1, 1, "b")


# What does not fit


def test_too_little_free_memory_is_told_with_figures() -> None:
    found = problem("parallel.tensor=2", machine=replace(LAPTOP, free_bytes=300 * MIB))
    assert (found.path, found.found) == ("engine.kv_cache", "auto")
    for text in ("2 ranks on this machine", "weights", "of 300 MiB free", "0.3 of the rest is 0 tokens", "one page"):
        assert text in found.message
    assert found.allowed is not None
    assert found.suggestion is not None
    assert "kv_cache_share" in found.suggestion


def test_too_little_for_the_longest_sequence_is_told_with_figures() -> None:
    tight = replace(LAPTOP, free_bytes=400 * MIB)
    assert checked(machine=tight).ok
    found = problem("model.max_length=8192", machine=tight)
    assert "too few for one sequence of model.max_length (8192 tokens)" in found.message


def test_the_free_memory_that_is_asked_for_is_enough() -> None:
    def with_free(mib: int) -> CheckReport:
        return checked("model.max_length=8192", machine=replace(LAPTOP, free_bytes=mib * MIB))

    assert with_free(400).errors[0].allowed == "with at least 896 MiB free"
    assert with_free(897).ok
    assert not with_free(895).ok


@pytest.mark.parametrize("setting", ["", "cluster.device_memory", "engine.kv_cache"])
def test_pages_in_8_bits_are_proposed_with_what_they_need(setting: str) -> None:
    def with_size(size: int, *overrides: str) -> CheckReport:
        stated = (f"{setting}={size}",) if setting else ()
        machine = LAPTOP if setting else replace(LAPTOP, free_bytes=size)
        return checked(*stated, "model.max_length=8192", *overrides, machine=machine)

    (found,) = with_size(100 * MIB if setting == "engine.kv_cache" else 300 * MIB).errors
    told = re.search(r"with engine\.kv_cache_dtype: int8 (.*) suffice", found.suggestion or "")
    assert told is not None
    needed = parse_size(told[1])  # in three figures
    assert with_size(needed * 101 // 100, "engine.kv_cache_dtype=int8").ok
    (found,) = with_size(needed * 98 // 100, "engine.kv_cache_dtype=int8").errors
    assert "int8" not in (found.suggestion or "")


def test_a_system_that_does_not_say_what_is_free_asks_for_a_size() -> None:
    found = problem(machine=replace(LAPTOP, free_bytes=None))
    assert found.path == "engine.kv_cache"
    assert "does not say how much memory is free" in found.message


@pytest.mark.parametrize(
    ("overrides", "machine", "exit_code", "path"),
    [
        (["cluster.ray=auto", "cluster.device=cuda", "cluster.device_memory=1GiB"], LAPTOP, 2, "cluster.device_memory"),
        (["cluster.device_memory=300MiB", "model.max_length=8192"], LAPTOP, 2, "cluster.device_memory"),
        (["model.max_length=8192"], replace(ONE_GPU, gpus=(Gpu("small", 1400 * MIB),)), 3, "engine.kv_cache"),
        ([], replace(ONE_GPU, gpus=(Gpu("tiny", 1 * GIB),)), 3, "engine.kv_cache"),
        ([], replace(LAPTOP, memory_bytes=256 * MIB, free_bytes=128 * MIB), 3, "engine.kv_cache"),
    ],
)
def test_devices_too_small_for_the_pool_are_told_once(
    overrides: list[str], machine: Machine, exit_code: int, path: str
) -> None:
    report = checked(*overrides, machine=machine)
    assert (report.exit_code, [each.path for each in report.errors]) == (exit_code, [path])


def test_a_length_that_the_model_lacks_is_the_only_problem() -> None:
    assert problem("model.max_length=10000").path == "model.max_length"
