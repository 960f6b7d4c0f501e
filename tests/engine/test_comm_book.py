from __future__ import annotations

from phalanx.comm.ledger import CommTotals
from phalanx.engine.comm_book import CommBook, between
from phalanx.engine.messages import CommReport


def total(layer: int, num_ops: int, exposed_us: float = 0.0) -> CommTotals:
    return CommTotals(layer, "all_reduce", num_ops, 10 * num_ops, exposed_us, 2 * exposed_us)


def test_reports_add_up_by_rank_layer_and_operation() -> None:
    book = CommBook()
    book.add(CommReport(0, 4, (total(0, 1, 5.0), total(1, 1))))
    book.add(CommReport(1, 4, (total(0, 3),)))
    book.add(CommReport(0, 9, (total(0, 2, 7.0),)))
    assert book.totals() == {0: (total(0, 3, 12.0), total(1, 1)), 1: (total(0, 3),)}


def test_the_last_step_is_the_one_that_all_have_told_of() -> None:
    book = CommBook()
    assert book.last_step == -1
    book.add(CommReport(0, 9, ()))
    book.add(CommReport(1, 4, ()))
    assert book.last_step == 4


def test_how_sums_are_hidden_is_what_was_told_last() -> None:
    book = CommBook()
    assert book.overlaps() == {}
    for told in ("", "parts", "none", ""):
        book.add(CommReport(0, 4, (), overlap=told))
    book.add(CommReport(1, 4, ()))
    assert book.overlaps() == {0: "none"}


def test_what_came_between_two_readings_is_their_difference() -> None:
    book = CommBook()
    book.add(CommReport(0, 1, (total(0, 1, 5.0), total(1, 1))))
    before = book.totals()
    book.add(CommReport(0, 2, (total(0, 2, 7.0), total(2, 1))))
    book.add(CommReport(1, 2, (total(0, 1),)))
    assert between(before, book.totals()) == {0: (total(0, 2, 7.0), total(2, 1)), 1: (total(0, 1),)}
