"""How a dimension is divided."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from phalanx.errors import LayoutError
from phalanx.parallel.split import Interval, Split

granules = st.sampled_from([1, 2, 3, 16, 64])
weights = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    parts = draw(weights)
    granule = draw(granules)
    size = draw(st.integers((len(parts) - 1) * granule + 1, 5000 + len(parts) * granule))
    return Split.weighted(size, parts, granule)


@given(splits())
def test_covers_the_dimension_once_and_in_order(split: Split) -> None:
    elements = [element for part in split.intervals for element in range(part.start, part.stop)]
    assert elements == list(range(split.size))
    assert all(part.size > 0 for part in split.intervals)


@given(splits())
def test_cuts_fall_on_granules(split: Split) -> None:
    assert all(part.start % split.granule == 0 for part in split.intervals)


@given(splits())
def test_owner_is_the_part_that_holds_the_element(split: Split) -> None:
    for part, interval in enumerate(split.intervals):
        assert split.owner(interval.start) == split.owner(interval.stop - 1) == part


@given(weights, st.integers(200, 5000), granules)
def test_weights_are_respected_within_one_granule(parts: list[float], size: int, granule: int) -> None:
    num_granules = -(-size // granule)
    ideal = [num_granules * weight / sum(parts) for weight in parts]
    if num_granules < len(parts) or min(ideal) < 1:
        return  # a part that is owed less than one granule takes it from the others
    split = Split.weighted(size, parts, granule)
    for interval, share in zip(split.intervals, ideal, strict=True):
        assert abs(-(-interval.size // granule) - share) < 1 + 1e-6


@given(st.integers(1, 16), st.integers(1, 500), granules)
def test_even_parts_differ_by_at_most_one_granule(parts: int, extra: int, granule: int) -> None:
    sizes = Split.even((parts + extra) * granule, parts, granule).sizes
    assert max(sizes) - min(sizes) <= granule
    assert list(sizes) == sorted(sizes, reverse=True)


@given(splits())
def test_json_brings_back_the_same_split(split: Split) -> None:
    assert msgspec.json.decode(msgspec.json.encode(split), type=Split) == split


@given(splits(), weights)
def test_transfers_send_every_element_once(split: Split, others: list[float]) -> None:
    if split.size < len(others):
        return
    target = Split.weighted(split.size, others)
    sent: list[int] = []
    for transfer in split.transfers(target):
        elements = range(transfer.interval.start, transfer.interval.stop)
        assert all(split.owner(element) == transfer.source for element in (elements[0], elements[-1]))
        assert all(target.owner(element) == transfer.target for element in (elements[0], elements[-1]))
        sent.extend(elements)
    assert sorted(sent) == list(range(split.size))


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_a_border_kv_head_is_held_by_both_neighbours(kv_heads: int, group: int, data: st.DataObject) -> None:
    heads = kv_heads * group
    queries = Split.even(heads, data.draw(st.integers(1, heads)))
    keys = queries.covering(group)
    for query, key in zip(queries.intervals, keys.intervals, strict=True):
        needed = {head // group for head in range(query.start, query.stop)}
        assert needed == set(range(key.start, key.stop))


def test_nine_heads_over_two_ranks_share_one_kv_head() -> None:
    queries = Split.even(9, 2)
    assert queries.intervals == (Interval(0, 5), Interval(5, 9))
    assert queries.covering(3).intervals == (Interval(0, 2), Interval(1, 3))


def test_two_to_one_weights_of_nine_heads() -> None:
    assert Split.weighted(9, (2, 1)).sizes == (6, 3)


def test_a_dwarfed_part_still_gets_one_granule() -> None:
    assert Split.weighted(4, (1000, 1, 1)).sizes == (2, 1, 1)


def test_explicit_bounds_are_kept() -> None:
    assert Split.explicit(10, [0, 4, 10], granule=4).sizes == (4, 6)


@pytest.mark.parametrize("bounds", [[0, 10, 5], [0, 5], [1, 10], [0, 0, 10], [10]])
def test_bounds_that_do_not_rise_over_the_whole_dimension_are_refused(bounds: list[int]) -> None:
    with pytest.raises(LayoutError, match="must rise from 0 to 10"):
        Split.explicit(10, bounds)


def test_bounds_off_the_granule_are_refused() -> None:
    with pytest.raises(LayoutError, match="multiples of the granule 4"):
        Split.explicit(10, [0, 5, 10], granule=4)


def test_more_parts_than_granules_are_refused_with_figures() -> None:
    with pytest.raises(LayoutError, match="9 elements are 9, too few to give each of 10 parts one"):
        Split.even(9, 10)


@pytest.mark.parametrize("wrong", [[], [1, 0], [1, -2], [1, float("nan")]])
def test_weights_that_are_not_positive_are_refused(wrong: list[float]) -> None:
    with pytest.raises(LayoutError, match="weight"):
        Split.weighted(10, wrong)
