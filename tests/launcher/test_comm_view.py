from __future__ import annotations

import pytest
from rich.console import Console

from phalanx.comm.ledger import CommTotals
from phalanx.engine.messages import RankReady
from phalanx.launcher.comm_view import CommUse, comm_table, comm_words
from phalanx.launcher.link_rates import GroupLink, group_links

TOTALS = {
    0: (CommTotals(-1, "recv", 10, 1000, 500.0, 0.0), CommTotals(0, "all_reduce", 20, 4000, 900.0, 100.0)),
    1: (CommTotals(0, "all_reduce", 20, 4000, 100.0, 300.0), CommTotals(1, "all_reduce", 20, 4000, 300.0, 0.0)),
}


def test_figures_are_of_a_step_and_the_mean_of_ranks() -> None:
    use = CommUse.of(TOTALS, 10)
    ops = {each.op: each for each in use.ops}
    assert (ops["recv"].per_step, ops["recv"].exposed_us_per_step) == (0.5, 25.0)
    assert ops["all_reduce"].per_step == 3.0
    assert ops["all_reduce"].bytes_per_step == pytest.approx(600.0)
    assert ops["all_reduce"].exposed_us_per_step == pytest.approx(65.0)
    assert ops["all_reduce"].hidden_us_per_step == pytest.approx(20.0)
    assert use.exposed_us == pytest.approx(90.0)
    assert use.layers == ((-1, 50.0), (0, 50.0), (1, 30.0))
    assert use.ranks == ((0, 140.0), (1, 40.0))


def test_the_words_name_the_layer_and_the_rank_that_cost_most() -> None:
    layers, rank = comm_words(CommUse.of(TOTALS, 10))
    assert "most 50 in layer 0" in layers
    assert "least 30 in layer 1" in layers
    assert "waited for rank 1: it waited 40 us a step itself, they 140 to 140" in rank


def test_ranks_that_wait_alike_are_not_accused() -> None:
    even = {0: TOTALS[1], 1: TOTALS[1]}
    assert len(comm_words(CommUse.of(even, 10))) == 1


def test_the_table_has_a_row_for_each_operation() -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comm_table(CommUse.of(TOTALS, 10)))
    rows = [line.split() for line in capture.get().splitlines()]
    assert ["recv", "0.5", "0.1", "25", "0"] in rows
    assert ["all_reduce", "3.0", "0.6", "65", "20"] in rows


def test_where_ranks_know_for_whom_they_waited_that_one_is_named() -> None:
    use = CommUse.of(TOTALS, 10, {0: {1: 900.0}, 1: {0: 100.0}})
    assert use.waits == ((0, 10.0), (1, 90.0))
    assert "the slowest is rank 1: the others together waited 90 us a step for it, 180 for all" in comm_words(use)[1]
    even = CommUse.of(TOTALS, 10, {0: {1: 900.0}, 1: {0: 890.0}})
    assert len(comm_words(even)) == 1


def test_a_choice_that_steps_have_moved_is_told() -> None:
    use = CommUse.of(TOTALS, 10, overlaps={2: "none at 512 tokens: too slow a link"})
    assert "overlap in the stage of rank 2 now: none at 512 tokens: too slow a link" in comm_words(use)


def ready(rank: int, node: str, mbits_per_s: float) -> RankReady:
    groups = {"pipeline": (0, 1, 2), "stage0": (0, 1)}
    return RankReady(rank, node, 1, {}, 0, 0, 0, groups=groups, link_bytes_per_s=mbits_per_s * 1e6 / 8)


def test_what_is_achieved_of_a_link_is_told_where_its_rate_is_known() -> None:
    links = group_links([ready(0, "a", 1000), ready(1, "a", 1000), ready(2, "b", 100)])
    assert links == {"pipeline": GroupLink((0, 0, 2), 12.5e6)}  # the slower; within a machine there is no link
    totals = {
        0: (CommTotals(-1, "send", 1, 1000, 50.0, 150.0, "pipeline"), CommTotals(-1, "send", 1, 9, 1.0, 0.0, "stage0")),
        1: (CommTotals(0, "all_reduce", 1, 1000, 50.0, 0.0, "stage0"),),
    }
    ops = {each.op: each for each in CommUse.of(totals, 1, None, links).ops}
    assert ops["send"].link_bytes_per_s == 12.5e6
    assert ops["send"].achieved_bytes_per_s == pytest.approx(5e6)
    assert ops["all_reduce"].link_bytes_per_s is None
    console = Console(width=120)
    with console.capture() as capture:
        console.print(comm_table(CommUse.of(totals, 1, None, links)))
    assert "40 of 100" in capture.get()


def test_a_link_of_unknown_rate_is_not_told() -> None:
    assert group_links([ready(0, "a", 1000), ready(1, "a", 1000), ready(2, "b", 0)]) == {}
