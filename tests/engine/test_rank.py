"""A rank by itself: every transfer of a step stands in its ledger under that step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import msgspec
import pytest
from tests.tiny_models import TINY_MODELS, make

from phalanx.engine.channel import RankChannel
from phalanx.engine.clock import ClockExchange, ClockKeeper
from phalanx.engine.messages import CommSettings, KVMeasure, RankSpec, Shutdown, ToEngine, ToRank, TraceReport
from phalanx.engine.rank import WARMUP, Rank
from phalanx.errors import PhalanxError
from phalanx.models.resolve import resolve_model
from phalanx.parallel.layout import StageRequest, build_layout


@pytest.fixture
def spec(tmp_path: Path) -> RankSpec:
    source = resolve_model(str(make(TINY_MODELS["smollm2"], tmp_path)))
    return RankSpec(
        replica=0,
        rank=0,
        layout=build_layout(source.config.shape, [StageRequest()]),
        config=source.config,
        entries=source.entries(),
        dtype="float32",
        device="cpu",
        num_threads=1,
        num_pages=4,
        page_size=16,
        max_sequences=4,
        max_batch_tokens=40,
        max_length=64,
        comm=CommSettings(store=""),
        engine="",
        secret="",
    )


def test_the_transfers_of_a_step_stand_in_the_ledger_under_it(spec: RankSpec) -> None:
    rank = Rank(spec, lambda _: None)
    num_layers = TINY_MODELS["smollm2"].config["num_hidden_layers"]
    rank.run(msgspec.structs.replace(WARMUP[0], step=7))
    rank.run(msgspec.structs.replace(WARMUP[1], step=8))
    for step in (7, 8):
        # Of one rank only what is not fused with its norm: the end of the last layer.
        assert [(each.op, each.layer) for each in rank.ledger.entries(step)] == [("all_reduce", num_layers - 1)]
    rank.close()


def test_a_rank_that_measures_takes_the_stated_share_of_what_is_free_once_warm(spec: RankSpec) -> None:
    """Here as many pages as are allowed, since a tiny model's fit a thousand times."""
    measure = KVMeasure(share=0.01, device_part=1.0, limit_pages=21, least_pages=4, copies=1)
    rank = Rank(replace(spec, num_pages=0, measure=measure), lambda _: None)
    assert rank.ready().num_pages == 21
    ran = rank.run(msgspec.structs.replace(WARMUP[0], step=0))
    assert ran.result is not None
    assert len(ran.result.tokens) == 1
    rank.close()


def test_a_rank_without_room_for_the_longest_sequence_says_so(spec: RankSpec) -> None:
    measure = KVMeasure(share=1e-9, device_part=1.0, limit_pages=21, least_pages=4, copies=1)
    with pytest.raises(PhalanxError, match=r"no room for the KV cache: .* at least 4 are needed"):
        Rank(replace(spec, num_pages=0, measure=measure), lambda _: None)


class Scripted:
    """A channel that says what it is told to, and keeps what it hears."""

    def __init__(self, *messages: ToRank | None) -> None:
        self._messages = list(messages)
        self.heard: list[ToEngine] = []

    def receive(self, timeout_s: float | None = None) -> ToRank | None:
        return self._messages.pop(0)

    def send(self, message: ToEngine) -> None:
        self.heard.append(message)


@pytest.mark.parametrize("trace", [False, True])
def test_a_rank_hands_over_its_ledger_where_it_traces_and_only_there(spec: RankSpec, trace: bool) -> None:
    plans = [msgspec.structs.replace(plan, step=step) for step, plan in enumerate(WARMUP)]
    channel = Scripted(*plans, None, Shutdown())
    rank = Rank(replace(spec, trace=trace), lambda _: None)
    clock = ClockKeeper(lambda _: ClockExchange(1.0, 8.0, 8.0, 1.5))
    rank.serve(cast("RankChannel", channel), clock)
    rank.close()
    clock.close()
    reports = [message for message in channel.heard if isinstance(message, TraceReport)]
    assert len(reports) == trace
    for report in reports:
        assert [step.step for step in report.steps] == [0, 1]
        assert [each.step for each in report.transfers] == [0, 1]
        assert report.clock.offset_s == 6.75
        assert report.groups == {"stage0": (0,)}
