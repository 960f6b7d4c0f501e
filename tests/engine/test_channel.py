"""The wire between engine and ranks: messages both ways, and strangers ignored."""

from __future__ import annotations

import threading

import zmq

from phalanx.engine.channel import EngineChannel, RankChannel
from phalanx.engine.messages import Progress, Shutdown, StepResult


def test_messages_cross_both_ways() -> None:
    with EngineChannel("127.0.0.1", "secret") as engine, RankChannel(engine.address, 3, "secret") as rank:
        rank.send(Progress(3, "weights", 1, 2))
        assert engine.receive(5.0) == Progress(3, "weights", 1, 2)
        engine.send(3, Shutdown())
        assert rank.receive(5.0) == Shutdown()
        assert engine.receive(0.0) is None


def test_waking_ends_the_wait_for_a_message_and_says_so() -> None:
    with EngineChannel("127.0.0.1", "secret") as engine:
        threading.Timer(0.05, engine.wake).start()
        assert engine.receive(20.0) is None
        assert engine.woken
        assert engine.receive(0.0) is None
        assert not engine.woken


def test_a_rank_of_another_formation_is_not_heard() -> None:
    with EngineChannel("127.0.0.1", "secret") as engine, RankChannel(engine.address, 0, "other") as stranger:
        stranger.send(StepResult(0, ()))
        assert engine.receive(0.5) is None


def test_a_stranger_that_speaks_otherwise_does_no_harm() -> None:
    with (
        EngineChannel("127.0.0.1", "secret") as engine,
        zmq.Context() as context,
        context.socket(zmq.REQ) as stranger,
    ):
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(engine.address)
        stranger.send(b"hello")
        assert engine.receive(0.5) is None
