from __future__ import annotations

from phalanx.comm import Ledger, OpTotals
from phalanx.comm.ledger import CommTotals, LateTotals


def test_totals_are_sums_by_operation_and_step() -> None:
    ledger = Ledger()
    ledger.begin_step(1)
    ledger.record(1, "stage0", "all_reduce", 100, started_s=7.0, waited_s=1.0, ended_s=10.0)
    ledger.record(2, "stage0", "all_reduce", 50, started_s=8.0, waited_s=2.0, ended_s=10.0)
    ledger.begin_step(2)
    ledger.record(1, "world", "send", 8, started_s=9.5, waited_s=0.0, ended_s=10.0)
    assert ledger.summary() == {
        "all_reduce": OpTotals(num_ops=2, num_bytes=150, exposed_us=3e6, hidden_us=2e6),
        "send": OpTotals(num_ops=1, num_bytes=8, exposed_us=0.0, hidden_us=0.5e6),
    }
    assert set(ledger.summary(1)) == {"all_reduce"}
    assert [(entry.step, entry.group, entry.op) for entry in ledger.entries(2)] == [(2, "world", "send")]


def test_the_oldest_entries_give_way_and_are_counted() -> None:
    ledger = Ledger(capacity=2)
    for seq in range(5):
        ledger.record(seq, "world", "barrier", 0, 0.0, 0.0, 0.0)
    assert [entry.seq for entry in ledger.entries()] == [3, 4]
    assert ledger.num_dropped == 3


def test_operations_before_the_first_step_belong_to_none() -> None:
    ledger = Ledger()
    ledger.record(1, "world", "barrier", 0, 0.0, 0.0, 0.0)
    assert ledger.entries()[0].step == -1


def test_what_is_taken_is_summed_by_layer_and_told_once() -> None:
    ledger = Ledger()
    ledger.record(1, "stage0", "all_reduce", 8, started_s=1.0, waited_s=0.5, ended_s=2.0)
    ledger.layer = 3
    ledger.record(2, "stage0", "all_reduce", 8, started_s=2.0, waited_s=1.0, ended_s=3.0)
    ledger.record(3, "stage0", "all_reduce", 4, started_s=3.0, waited_s=0.0, ended_s=5.0)
    assert sorted(ledger.take().totals) == [
        CommTotals(
            layer=-1, op="all_reduce", num_ops=1, num_bytes=8, exposed_us=0.5e6, hidden_us=0.5e6, group="stage0"
        ),
        CommTotals(layer=3, op="all_reduce", num_ops=2, num_bytes=12, exposed_us=1e6, hidden_us=2e6, group="stage0"),
    ]
    assert ledger.take() == ((), (), 0, ())
    ledger.record(4, "stage0", "barrier", 0, 5.0, 1.0, 6.0)
    assert [(each.op, each.num_ops) for each in ledger.take().totals] == [("barrier", 1)]


def test_what_came_since_is_read_in_order_as_far_as_it_is_held() -> None:
    ledger = Ledger(capacity=3)
    for seq in range(5):
        ledger.record(seq, "world", "barrier", 0, 1.0, 0.5, 2.0, took_s=0.25)
    assert [each.seq for each in ledger.since(3)] == [3, 4]
    assert [each.seq for each in ledger.since(0)] == [2, 3, 4]
    assert [each.took_us for each in ledger.since(4)] == [0.25e6]
    assert ledger.since(5) == []


def test_what_has_given_way_is_not_taken() -> None:
    ledger = Ledger(capacity=2)
    for seq in range(5):
        ledger.record(seq, "world", "barrier", 0, 0.0, 0.0, 0.0)
    assert [each.num_ops for each in ledger.take().totals] == [2]


def test_what_another_thread_records_comes_along_as_what_was_not_waited_for() -> None:
    ledger, other = Ledger(), Ledger()
    ledger.follow(other)
    other.begin_step(3)
    other.record(1, "head", "recv", 10, 1.0, 0.5, 2.0, peer=1)
    ledger.begin_step(4)
    assert [(each.step, each.group, each.waited_us, each.hidden_us) for each in ledger.entries()] == [
        (3, "head", 0.0, 1e6)
    ]
    other.record(2, "head", "send", 10, 2.0, 0.5, 3.0, peer=1)
    taken = ledger.take()
    assert sum(each.num_ops for each in taken.totals) == 2
    assert not ledger.take().totals


def test_what_was_waited_for_is_summed_by_whom() -> None:
    ledger = Ledger()
    ledger.record(1, "g", "all_reduce", 8, 0.0, 1.0, 1.0, last=2)
    ledger.record(2, "g", "all_reduce", 8, 0.0, 2.0, 2.0, last=2)
    ledger.record(1, "h", "recv", 8, 0.0, 4.0, 4.0, peer=2)
    ledger.record(3, "g", "all_reduce", 8, 0.0, 8.0, 8.0)  # nobody knows for whom
    assert sorted(ledger.take().late) == [LateTotals("g", 2, 2, 3e6), LateTotals("h", 2, 1, 4e6)]


def test_the_entries_are_taken_with_the_totals_where_asked_for() -> None:
    ledger = Ledger(capacity=2)
    for seq in range(3):
        ledger.record(seq, "g", "barrier", 0, 0.0, 0.0, 0.0)
    taken = ledger.take(whole=True)
    assert ([each.seq for each in taken.entries], taken.num_lost) == ([1, 2], 1)
    ledger.record(3, "g", "barrier", 0, 0.0, 0.0, 0.0)
    assert [each.seq for each in ledger.take(whole=True).entries] == [3]
