from __future__ import annotations

from phalanx.comm.ledger import LedgerEntry
from phalanx.engine.clock import ClockReading
from phalanx.engine.messages import StageStep, TraceReport
from phalanx.engine.trace_book import TraceBook


def report(step: int, clock: ClockReading, *, num_transfers: int = 1, lost: int = 0) -> TraceReport:
    transfer = LedgerEntry(step, 0, 1, "stage0", "all_reduce", 8, 7e6, 1.0, 2.0)
    return TraceReport(3, (StageStep(step, 7.0, 8.0),), (transfer,) * num_transfers, clock, {"stage0": (3, 4)}, lost)


def test_what_ranks_tell_is_put_on_the_engines_clock() -> None:
    book = TraceBook()
    book.add(report(4, ClockReading(-5.0, 0.25)))
    book.add(report(5, ClockReading(-5.5, 0.125), lost=2))
    trace = book.traces(range(100))[3]
    assert trace.steps == (StageStep(4, 2.0, 3.0), StageStep(5, 1.5, 2.5))
    assert [each.started_us for each in trace.transfers] == [2e6, 1.5e6]
    assert (trace.clock, trace.num_lost) == (ClockReading(-5.0, 0.25), 2)
    assert book.last_steps == {3: 5}


def test_only_the_steps_that_are_asked_for_are_told() -> None:
    book = TraceBook()
    for step in range(4):
        book.add(report(step, ClockReading()))
    trace = book.traces(range(1, 3))[3]
    assert [step.step for step in trace.steps] == [each.step for each in trace.transfers] == [1, 2]


def test_the_oldest_give_way() -> None:
    book = TraceBook(capacity=10)
    for step in range(20):
        book.add(report(step, ClockReading(), num_transfers=3))
    assert [step.step for step in book.traces(range(100))[3].steps] == [18, 19]
