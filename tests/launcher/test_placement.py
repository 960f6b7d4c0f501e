"""Placement: who goes where, and what is said when somebody cannot go anywhere."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.errors import PlacementError
from phalanx.launcher.placement import Node, plan_placement
from phalanx.parallel.layout import Layout, StageRequest, build_layout
from phalanx.parallel.shape import ModelShape

SHAPE = ModelShape(
    hidden_size=64, num_layers=8, num_query_heads=16, num_kv_heads=4, head_dim=8, ffn_size=128, vocab_size=256
)
ONE_CPU = {"CPU": 1.0}


def layout(*stages: StageRequest | int, replicas: int = 1) -> Layout:
    requests = [StageRequest(num_ranks=stage) if isinstance(stage, int) else stage for stage in stages]
    return build_layout(SHAPE, requests, replicas)


def node(
    name: str, cpus: float = 0.0, *, free: float | None = None, gpus: float = 0.0, accelerator: str | None = None
) -> Node:
    total = {"CPU": cpus, "GPU": gpus}
    held = {"CPU": cpus if free is None else free, "GPU": gpus}
    return Node(f"id-{name}", f"10.0.0.{name}", f"host{name}.lan", total, held, accelerator, {"zone": f"z{name}"})


def test_a_replica_stays_on_one_node_where_it_fits() -> None:
    assert plan_placement(layout(2, 2), ONE_CPU, [node("1", 2), node("2", 4)]) == (("id-2",) * 4,)


def test_the_tightest_node_that_takes_a_replica_is_preferred() -> None:
    assert plan_placement(layout(2), ONE_CPU, [node("1", 16), node("2", 2)]) == (("id-2",) * 2,)


def test_stages_go_to_different_nodes_where_one_has_no_room_for_both() -> None:
    [plan] = plan_placement(layout(3, 2), ONE_CPU, [node("1", 2), node("2", 3)])
    assert plan == ("id-2", "id-2", "id-2", "id-1", "id-1")


def test_a_stage_is_not_divided_unless_that_is_allowed() -> None:
    nodes = [node("1", 2), node("2", 2)]
    with pytest.raises(PlacementError) as refused:
        plan_placement(layout(3), ONE_CPU, nodes)
    assert "stage 0 needs 3 ranks on one node, each taking CPU 1" in str(refused.value)
    assert "node host1.lan (10.0.0.1): room for 2 of 3 (CPU: 3 needed, 2 free of 2)" in str(refused.value)
    assert "cluster.spread_stage: true" in str(refused.value)
    [plan] = plan_placement(layout(3), ONE_CPU, nodes, spread_stage=True)
    assert plan in (("id-1", "id-1", "id-2"), ("id-1", "id-2", "id-2"))


def test_a_stage_that_fits_on_one_node_is_not_divided_even_where_that_is_allowed() -> None:
    [plan] = plan_placement(layout(2), ONE_CPU, [node("1", 1), node("2", 2)], spread_stage=True)
    assert plan == ("id-2", "id-2")


@pytest.mark.parametrize("name", ["10.0.0.2", "host2.lan", "host2", "id-2", "zone=z2"])
def test_a_stage_goes_to_the_node_it_names(name: str) -> None:
    [plan] = plan_placement(layout(StageRequest(1, node=name), 1), ONE_CPU, [node("1", 8), node("2", 1)])
    assert plan == ("id-2", "id-1")


def test_a_stage_goes_to_the_accelerator_it_names() -> None:
    nodes = [node("1", 8, gpus=1, accelerator="A100"), node("2", 8, gpus=1, accelerator="H100")]
    [plan] = plan_placement(layout(StageRequest(1, accelerator="h100"), 1), {"GPU": 1.0}, nodes)
    assert plan == ("id-2", "id-1")


def test_a_node_that_is_not_there_is_named_beside_those_that_are() -> None:
    with pytest.raises(PlacementError, match=r"stage 1 asks for node 'gpu-7', but the cluster has host1\.lan"):
        plan_placement(layout(1, StageRequest(1, node="gpu-7")), ONE_CPU, [node("1", 8)])


def test_an_accelerator_that_is_not_there_is_named() -> None:
    with pytest.raises(PlacementError, match=r"stage 0 asks for accelerator 'H100'.*A100"):
        plan_placement(layout(StageRequest(1, accelerator="H100")), ONE_CPU, [node("1", 8, accelerator="A100")])


def test_resources_that_other_work_holds_are_not_counted_and_are_named() -> None:
    with pytest.raises(PlacementError) as refused:
        plan_placement(layout(2), ONE_CPU, [node("1", 8, free=1)])
    assert "CPU: 2 needed, 1 free of 8" in str(refused.value)
    assert "free what other work on the cluster holds" in str(refused.value)


def test_stages_that_fit_each_but_not_together_are_refused_with_figures() -> None:
    with pytest.raises(PlacementError, match=r"4 ranks .* do not fit together:\n.*room for 2 of 4"):
        plan_placement(layout(2, 2), ONE_CPU, [node("1", 2)])


def test_missing_gpus_are_named() -> None:
    with pytest.raises(PlacementError, match="GPU: 2 needed, 1 free of 1"):
        plan_placement(layout(2), {"CPU": 1.0, "GPU": 1.0}, [node("1", 64, gpus=1)])


def test_fractions_that_floating_point_cannot_hold_still_fill_a_node() -> None:
    assert plan_placement(layout(3), {"CPU": 0.1}, [node("1", 0.1 + 0.2 - 1e-12)]) == (("id-1",) * 3,)


def test_replicas_are_placed_together() -> None:
    plan = plan_placement(layout(2, 2, replicas=2), ONE_CPU, [node("1", 4), node("2", 4)])
    assert sorted(plan) == [("id-1",) * 4, ("id-2",) * 4]


def test_an_empty_cluster_is_an_error() -> None:
    with pytest.raises(PlacementError, match="ray start"):
        plan_placement(layout(1), ONE_CPU, [])


WIDTHS = st.lists(st.integers(1, 4), min_size=1, max_size=4)
ROOMS = st.lists(st.integers(0, 6), min_size=1, max_size=4)


@st.composite
def clusters(draw: st.DrawFn) -> tuple[Layout, list[Node], int]:
    rooms = draw(ROOMS)
    pins = st.one_of(st.none(), st.integers(1, len(rooms)).map(lambda index: f"id-{index}"))
    stages = [StageRequest(width, node=draw(pins)) for width in draw(WIDTHS)]
    return layout(*stages), [node(str(index), room) for index, room in enumerate(rooms, 1)], draw(st.integers(1, 2))


@settings(deadline=None, max_examples=200)
@given(clusters())
def test_whole_stages_are_placed_exactly_where_brute_force_finds_a_way(drawn: tuple[Layout, list[Node], int]) -> None:
    plan_layout, nodes, replicas = drawn
    stages = list(plan_layout.stages) * replicas
    possible = any(
        all(
            sum(stage.num_ranks for stage, place in zip(stages, places, strict=True) if place is each)
            <= each.free["CPU"]
            for each in nodes
        )
        and all(place.suits(stage) for stage, place in zip(stages, places, strict=True))
        for places in product(nodes, repeat=len(stages))
    )
    try:
        plan = plan_placement(plan_layout, ONE_CPU, nodes, replicas=replicas)
    except PlacementError:
        assert not possible
        return
    assert possible
    _check(plan, plan_layout, nodes)
    for ranks in plan:
        for stage in plan_layout.stages:
            assert len({ranks[rank] for rank in plan_layout.stage_ranks(stage.index)}) == 1


@settings(deadline=None, max_examples=200)
@given(clusters())
def test_divided_stages_are_placed_exactly_where_hall_s_condition_holds(drawn: tuple[Layout, list[Node], int]) -> None:
    plan_layout, nodes, replicas = drawn
    # Hall: a way exists if and only if no set of nodes is asked to hold more ranks than it has room for.
    subsets = [
        [each for each, bit in zip(nodes, bits, strict=True) if bit] for bits in product((0, 1), repeat=len(nodes))
    ]
    possible = all(
        sum(s.num_ranks for s in plan_layout.stages if all(each in subset for each in nodes if each.suits(s)))
        * replicas
        <= sum(each.free["CPU"] for each in subset)
        for subset in subsets
    )
    try:
        plan = plan_placement(plan_layout, ONE_CPU, nodes, replicas=replicas, spread_stage=True)
    except PlacementError:
        assert not possible
        return
    assert possible
    _check(plan, plan_layout, nodes)


def _check(plan: tuple[tuple[str, ...], ...], plan_layout: Layout, nodes: list[Node]) -> None:
    by_id = {each.node_id: each for each in nodes}
    placed = [node_id for ranks in plan for node_id in ranks]
    assert all(placed.count(each.node_id) <= each.free["CPU"] for each in nodes)
    for ranks in plan:
        for place in plan_layout.places():
            assert by_id[ranks[place.rank]].suits(plan_layout.stages[place.stage])
