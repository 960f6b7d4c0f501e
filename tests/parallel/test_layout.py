"""Who holds what."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import LayoutError
from phalanx.parallel.layout import HEAD_GRANULE, Layout, StageRequest, build_layout, head_obstacle
from phalanx.parallel.shape import ModelShape

SMOLLM = ModelShape(576, 30, 9, 3, 64, 1536, 49152)


def layers(layout: Layout) -> list[int]:
    return [stage.layers.size for stage in layout.stages]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3))
def test_every_layer_head_column_and_row_is_held(widths: list[int], replicas: int) -> None:
    layout = build_layout(SMOLLM, [StageRequest(width) for width in widths], replicas)
    held = [layer for stage in layout.stages for layer in range(stage.layers.start, stage.layers.stop)]
    assert held == list(range(30))
    assert [stage.num_ranks for stage in layout.stages] == widths
    assert [place.rank for place in layout.places()] == list(range(sum(widths)))
    for stage in layout.stages:
        assert sum(stage.query_heads.sizes) == 9
        assert sum(stage.ffn.sizes) == 1536
        assert sum(stage.vocab.sizes) == 49152
    assert [stage.first for stage in layout.stages] == [i == 0 for i in range(len(widths))]
    assert [stage.last for stage in layout.stages] == [i == len(widths) - 1 for i in range(len(widths))]


def test_json_brings_back_the_same_layout() -> None:
    layout = build_layout(SMOLLM, [StageRequest(3, 20), StageRequest(2, weights=(2, 1), node="b")], replicas=2)
    assert msgspec.json.decode(msgspec.json.encode(layout), type=Layout) == layout


def test_the_stage_with_the_head_gets_fewer_layers() -> None:
    """The head of smollm2 weighs as much as eight of its layers, and counts by half."""
    first, last = layers(build_layout(SMOLLM, [StageRequest(), StageRequest()]))
    assert first - last == 4


def test_a_stage_of_more_ranks_gets_more_layers() -> None:
    first, last = layers(build_layout(SMOLLM, [StageRequest(3), StageRequest(1)]))
    assert first > 3 * last


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_no_move_of_a_layer_makes_the_slowest_stage_faster(widths: list[int]) -> None:
    layout = build_layout(SMOLLM, [StageRequest(width) for width in widths])

    def slowest(counts: list[int]) -> float:
        costs = [count * SMOLLM.layer_params / width for count, width in zip(counts, widths, strict=True)]
        costs[-1] += SMOLLM.head_params / 2 / widths[-1]
        return max(costs)

    dealt = layers(layout)
    for source in range(len(widths)):
        for target in range(len(widths)):
            moved = list(dealt)
            moved[source] -= 1
            moved[target] += 1
            if min(moved) >= 1:
                assert slowest(moved) >= slowest(dealt) * (1 - 1e-9)


def test_given_layers_are_kept_and_the_rest_balanced() -> None:
    assert layers(build_layout(SMOLLM, [StageRequest(1, 4), StageRequest(2), StageRequest(1, 6)])) == [4, 20, 6]


def test_a_shared_head_leaves_the_layers_even() -> None:
    """Each stage then takes as long for a prompt, and for a token that is drawn."""
    layout = build_layout(SMOLLM, [StageRequest(), StageRequest()], shares_head=True)
    assert layers(layout) == [15, 15]
    assert [stage.head for stage in layout.stages] == [((24576, 49152),), ((0, 24576),)]
    assert layout.shares_head
    assert not build_layout(SMOLLM, [StageRequest(), StageRequest()]).shares_head


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.sampled_from([320, 1000, 49152]),
)
def test_shares_of_a_head_cover_it_and_even_out_the_ends(counts: list[int], weights: list[int], vocab: int) -> None:
    """Of given layers, as far as they are less unlike than the whole head, and but for one granule of rows."""
    shape = replace(SMOLLM, num_layers=sum(counts), vocab_size=vocab)
    requests = [StageRequest(len(weights), count, tuple(weights)) for count in counts]
    if head_obstacle(shape, requests) is not None:
        with pytest.raises(LayoutError, match="cannot be shared: a rank has"):
            build_layout(shape, requests, shares_head=True)
        return
    first, *_, last = stages = build_layout(shape, requests, shares_head=True).stages
    assert all(not stage.head for stage in stages[1:-1])
    lead = (last.layers.size - first.layers.size) * shape.layer_params / shape.hidden_size  # in rows of the head
    for rows, above, below in zip(last.vocab.intervals, last.head, first.head, strict=True):
        assert (rows.start, rows.stop) == (above.start, below.stop)
        assert rows.start < above.stop == below.start < rows.stop
        assert (above.stop - rows.start) % HEAD_GRANULE == 0
        wanted = rows.size * (1 + lead / vocab) / 2  # of the first stage
        clamped = min(max(wanted, 0.0), rows.size)
        assert abs(below.size - clamped) <= HEAD_GRANULE


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([StageRequest()], "there is one stage"),
        ([StageRequest(2), StageRequest(1)], "cut the vocabulary in other parts"),
        ([StageRequest(2), StageRequest(2, weights=(2, 1))], "cut the vocabulary in other parts"),
    ],
)
def test_a_head_that_cannot_be_shared_is_refused(requests: list[StageRequest], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        build_layout(SMOLLM, requests, shares_head=True)


def test_weights_cut_every_dimension_alike() -> None:
    stage = build_layout(SMOLLM, [StageRequest(2, weights=(2, 1))]).stages[0]
    assert stage.query_heads.sizes == (6, 3)
    assert stage.kv_heads.sizes == (2, 1)
    assert stage.ffn.sizes == (1024, 512)
    assert stage.vocab.sizes == (32768, 16384)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([StageRequest(10)], "10 tensor-parallel ranks, but the model has 9 query heads"),
        ([StageRequest(1, 20), StageRequest(1, 20)], "ask for 40 layers, but the model has 30"),
        ([StageRequest(1, 30), StageRequest(1)], "30 layers and 1 more stages, but the model has 30"),
        ([StageRequest(1, 0), StageRequest(1, 30)], "at least one layer"),
        ([StageRequest(2, weights=(1, 2, 3))], "2 ranks but 3 weights"),
        ([StageRequest(1)] * 31, "31 more stages, but the model has 30"),
        ([], "at least one stage"),
    ],
)
def test_a_division_that_cannot_be_done_is_refused_with_figures(requests: list[StageRequest], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        build_layout(SMOLLM, requests)
