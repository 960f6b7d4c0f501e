from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from tests.launcher.machines import machine

from phalanx.launcher.core_plan import CorePlan, plan_cores
from phalanx.launcher.topology import Core, Topology


def cpus(plan: CorePlan) -> list[list[int]]:
    return [[cpu for core in mine for cpu in core.cpus] for mine in plan.cores]


def nodes(plan: CorePlan) -> list[list[int]]:
    return [sorted({core.node for core in mine}) for mine in plan.cores]


def test_two_ranks_on_two_cores_get_one_each() -> None:
    plan = plan_cores(machine(2), [2], 1)
    assert cpus(plan) == [[0], [1]]
    assert plan.reason == "each rank has its own"


def test_a_rank_has_all_hardware_threads_of_its_cores() -> None:
    assert cpus(plan_cores(machine(4, threads=2), [2], 2)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_ranks_of_a_large_machine_have_a_node_each() -> None:
    plan = plan_cores(machine(64, 64, threads=2), [2], 64)
    assert nodes(plan) == [[0], [1]]
    assert [len(mine) for mine in cpus(plan)] == [128, 128]


def test_a_tensor_group_is_near_one_node_and_the_next_one_near_another() -> None:
    assert nodes(plan_cores(machine(8, 8, 8, 8), [2, 2, 2], 4)) == [[0], [0], [1], [1], [2], [2]]


def test_neighbours_of_a_group_that_no_node_holds_lie_together() -> None:
    assert nodes(plan_cores(machine(4, 4), [4], 2)) == [[0], [0], [1], [1]]


def test_a_rank_is_divided_over_nodes_only_where_none_has_room() -> None:
    assert nodes(plan_cores(machine(4, 4), [3], 2)) == [[0], [0], [1]]
    assert nodes(plan_cores(machine(3, 3), [3], 2)) == [[0], [1], [0, 1]]


def test_whole_cores_come_before_those_that_others_may_run_on() -> None:
    odd = Topology((Core((1,), 0, whole=False), Core((3, 7), 0), Core((2, 6), 0)))
    assert cpus(plan_cores(odd, [2], 1)) == [[2, 6], [3, 7]]
    assert cpus(plan_cores(odd, [3], 1)) == [[2, 6], [3, 7], [1]]


def test_more_threads_than_cores_take_their_hardware_threads() -> None:
    assert cpus(plan_cores(machine(4, threads=2), [2], 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_more_ranks_than_cores_are_not_held_to_any() -> None:
    plan = plan_cores(machine(2), [2, 2], 1)
    assert not plan.cores
    assert plan.reason == "4 ranks of 1 thread are more than 2 cores can take apart"


def test_more_threads_than_cores_are_not_held_to_any() -> None:
    assert not plan_cores(machine(4), [2], 3).cores


def test_one_rank_that_uses_the_whole_machine_is_not_held_to_it() -> None:
    plan = plan_cores(machine(2), [1], 2)
    assert not plan.cores
    assert plan.reason == "one rank computes on all of them"


def test_one_rank_of_fewer_threads_keeps_to_one_node() -> None:
    assert nodes(plan_cores(machine(4, 4), [1], 4)) == [[0]]


def test_where_time_is_limited_nobody_knows_which_cores_are_free() -> None:
    plan = plan_cores(machine(8, quota=2.0), [2], 1)
    assert not plan.cores
    assert plan.reason == "their time is limited, to that of 2 cores, and not the cores themselves"


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 2),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.integers(1, 6),
)
def test_cores_are_disjoint_and_suffice(
    sizes: Sequence[int], threads: int, groups: Sequence[int], num_threads: int
) -> None:
    topology = machine(*sizes, threads=threads)
    plan = plan_cores(topology, groups, num_threads)
    if plan.cores:
        dealt = [cpu for mine in cpus(plan) for cpu in mine]
        assert len(dealt) == len(set(dealt))
        assert topology.cpus.issuperset(dealt)
        assert len(plan.cores) == sum(groups)
        assert all(len(mine) >= num_threads for mine in cpus(plan))
    elif sum(groups) > 1:  # there is no room
        assert sum(groups) * num_threads > len(topology.cores)
