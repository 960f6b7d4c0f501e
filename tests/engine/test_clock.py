"""What exchanges with the engine say of a rank's clock."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from phalanx.engine.channel import EngineChannel, RankChannel
from phalanx.engine.clock import DRIFT, KEPT, ClockExchange, ClockFilter, ClockKeeper, ClockReading

DELAYS = st.floats(0, 0.2)


def exchange(offset_s: float, there_s: float, busy_s: float, back_s: float, asked_s: float = 100.0) -> ClockExchange:
    """Of a rank whose clock is `offset_s` behind the engine's."""
    heard_s = asked_s + there_s + offset_s
    return ClockExchange(asked_s, heard_s, heard_s + busy_s, asked_s + there_s + busy_s + back_s)


@given(st.floats(-1e4, 1e4), DELAYS, DELAYS, DELAYS)
def test_the_truth_is_within_the_error_whatever_the_delays(
    offset_s: float, there_s: float, busy_s: float, back_s: float
) -> None:
    made = exchange(offset_s, there_s, busy_s, back_s)
    reading = made.reading(made.had_s)
    assert abs(reading.offset_s - offset_s) <= reading.error_s + 1e-9


@given(st.lists(st.tuples(DELAYS, DELAYS), min_size=1, max_size=KEPT), st.floats(1, 1e4))
def test_the_shortest_round_trip_of_late_is_believed(delays: list[tuple[float, float]], offset_s: float) -> None:
    clocks = ClockFilter()
    for there_s, back_s in delays:
        clocks.add(exchange(offset_s, there_s, 0.0, back_s))
    reading = clocks.reading(100.0)
    assert abs(reading.error_s - min(map(sum, delays)) / 2) < 1e-9
    assert abs(reading.offset_s - offset_s) <= reading.error_s + 1e-9


def test_an_old_exchange_gives_way_to_a_worse_one_of_now() -> None:
    clocks = ClockFilter()
    clocks.add(exchange(50.0, 0.0001, 0.0, 0.0001, asked_s=100.0))
    drifted_s = 50.0 + DRIFT / 2 * 1000  # half of what is allowed for
    clocks.add(exchange(drifted_s, 0.001, 0.0, 0.001, asked_s=1100.0))
    assert abs(clocks.reading(100.1).offset_s - 50.0) < 1e-6
    assert abs(clocks.reading(1100.1).offset_s - drifted_s) < 1e-6


def test_an_offset_within_the_error_is_none() -> None:
    clocks = ClockFilter()
    clocks.add(exchange(0.0, 0.002, 0.0, 0.001))  # looks like half a millisecond
    assert clocks.reading(100.0).offset_s == 0.0
    assert clocks.reading(100.0).error_s > 0.0005


def test_a_clock_that_nobody_could_ask_is_of_unknown_error() -> None:
    assert ClockFilter().reading(1.0) == ClockReading(0.0, float("inf"))


def test_the_engine_answers_while_it_receives() -> None:
    with EngineChannel("127.0.0.1", "secret") as engine, RankChannel(engine.address, 0, "secret") as rank:
        heard: list[object] = []
        receiving = threading.Thread(target=lambda: heard.append(engine.receive(30.0)))
        receiving.start()
        keeper = ClockKeeper(rank.ask_time)
        reading = keeper.reading()
        keeper.close()
        engine.wake()
        receiving.join()
    assert heard == [None]  # questions are no messages
    assert reading.offset_s == 0.0  # both read one clock
    assert 0 < reading.error_s < float("inf")


def test_an_engine_that_does_not_listen_is_not_waited_for() -> None:
    with EngineChannel("127.0.0.1", "secret") as engine, RankChannel(engine.address, 0, "secret") as rank:
        assert rank.ask_time(0.05) is None
        answers = threading.Thread(target=lambda: engine.receive(0.3))
        answers.start()
        later = rank.ask_time(10.0)  # not the answer to the question before
        answers.join()
    assert later is not None
    assert later.round_trip_s >= 0
