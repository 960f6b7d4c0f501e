"""A rank by itself: every transfer of a step stands in its ledger under that step."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tests.engine.made_up_memory import MIB, MadeUpMemory
from tests.tiny_models import TINY_MODELS, make

from phalanx.engine.channel import RankChannel
from phalanx.engine.clock import ClockExchange, ClockKeeper
from phalanx.engine.late_result import LateResult
from phalanx.engine.messages import (
    CommSettings,
    KVMeasure,
    RankSpec,
    Shutdown,
    StageStep,
    StepPlan,
    StepResult,
    ToEngine,
    ToRank,
    TraceReport,
)
from phalanx.engine.rank import Rank
from phalanx.engine.runner import Ran, StepRunner
from phalanx.engine.step_loop import StepLoop
from phalanx.engine.trial import WARMUP
from phalanx.errors import PhalanxError
from phalanx.models.batch import KVCache
from phalanx.models.params import kv_bytes_per_token
from phalanx.models.resolve import resolve_model
from phalanx.models.weights import load_params
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
    assert isinstance(ran.result, StepResult)
    assert len(ran.result.tokens) == 1
    rank.close()


def test_the_cache_that_was_measured_with_is_given_up(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the steps that were recorded with it, too: the next one takes its place."""
    made: list[weakref.ref[KVCache]] = []

    def make_cache(*arguments: Any) -> KVCache:
        cache = KVCache(*arguments)
        made.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr("phalanx.engine.rank.KVCache", make_cache)
    monkeypatch.setattr("phalanx.engine.rank.WARMUP", (WARMUP[0], *(WARMUP[1],) * 3))  # the third token is a replay
    measure = KVMeasure(share=0.01, device_part=1.0, limit_pages=21, least_pages=4, copies=1)
    rank = Rank(replace(spec, dtype="bfloat16", num_pages=0, measure=measure), lambda _: None)
    assert [cache() is None for cache in made] == [True, False]
    rank.close()


def test_a_rank_without_room_for_the_longest_sequence_says_so(spec: RankSpec) -> None:
    measure = KVMeasure(share=1e-9, device_part=1.0, limit_pages=21, least_pages=4, copies=1)
    with pytest.raises(PhalanxError, match=r"no room for the KV cache: .* at least 4 are needed"):
        Rank(replace(spec, num_pages=0, measure=measure), lambda _: None)


def on_a_made_up_gpu(monkeypatch: pytest.MonkeyPatch, total: int) -> MadeUpMemory:
    """Of so many MiB: the weights take 100, a page 1, and a token 1 on its way; 50 are in use before."""
    memory = MadeUpMemory(total, outside=50)
    monkeypatch.setattr("phalanx.engine.rank.memory_meter", lambda _: memory)

    def load(*arguments: Any, **settings: Any) -> Any:
        memory.take(100)
        return load_params(*arguments, **settings)

    def make_cache(num_layers: int, num_pages: int, *arguments: Any) -> KVCache:
        memory.take(num_pages)
        cache = KVCache(num_layers, num_pages, *arguments)
        weakref.finalize(cache, memory.drop, num_pages)
        return cache

    def run(runner: StepRunner, plan: StepPlan, *arguments: Any) -> Ran:
        memory.use(plan.num_tokens)
        return run_step(runner, plan, *arguments)

    run_step = StepRunner.run
    monkeypatch.setattr("phalanx.engine.rank.load_params", load)
    monkeypatch.setattr("phalanx.engine.rank.KVCache", make_cache)
    monkeypatch.setattr(StepRunner, "run", run)
    return memory


MEASURE = KVMeasure(share=0.005, device_part=1.0, limit_pages=1000, least_pages=4, copies=1)


def test_pages_are_what_weights_and_the_widest_step_leave_of_a_gpu(
    spec: RankSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = on_a_made_up_gpu(monkeypatch, 300)
    page_bytes = 16 * kv_bytes_per_token(spec.config, spec.layout, next(spec.layout.places(0)), 4)
    rank = Rank(replace(spec, num_pages=0, measure=MEASURE), lambda _: None)
    ready = rank.ready()
    assert ready.num_pages == int((300 - 50 - 100 - 40) * MIB * MEASURE.share) // page_bytes
    assert sum(ready.memory.values()) == memory.total * MIB
    assert ready.memory["weights"] == 100 * MIB
    assert ready.memory["activations"] == 40 * MIB  # max_batch_tokens
    rank.close()


@pytest.mark.parametrize(
    ("total", "where", "remedy"),
    [
        (120, "the loading of weights", "ranks in place of 1"),
        (152, "the making of 3 pages", "more ranks"),
        (175, r"a first step of 40 tokens, 1 drawn", r"engine\.max_batch_tokens: 16"),
    ],
)
def test_a_start_that_is_short_of_memory_says_where_and_what_would_fit(
    spec: RankSpec, total: int, where: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_made_up_gpu(monkeypatch, total)
    with pytest.raises(PhalanxError, match=rf"out of GPU memory in {where}, .*(\n.*)*would fit: .*{remedy}"):
        Rank(replace(spec, num_pages=0, measure=MEASURE), lambda _: None)


class Script:
    """The engine's messages, as a rank's channel would bring them, and what it answers. None: nothing has come yet."""

    def __init__(self, messages: Sequence[ToRank | None]) -> None:
        self._messages = deque(messages)
        self.heard: list[ToEngine] = []

    def receive(self, timeout_s: float | None = None) -> ToRank | None:
        while timeout_s is None and self._messages[0] is None:
            self._messages.popleft()
        return self._messages.popleft()

    def send(self, message: ToEngine) -> None:
        self.heard.append(message)


def serve(rank: Rank, channel: Script) -> None:
    clock = ClockKeeper(lambda _: ClockExchange(1.0, 8.0, 8.0, 1.5))
    StepLoop(rank, cast("RankChannel", channel), clock).run()
    rank.close()
    clock.close()


@pytest.mark.parametrize("trace", [False, True])
def test_a_rank_hands_over_its_ledger_where_it_traces_and_only_there(spec: RankSpec, trace: bool) -> None:
    plans = [msgspec.structs.replace(plan, step=step) for step, plan in enumerate(WARMUP)]
    waits: list[ToRank | None] = [None, None, None]  # while a plan is there, while a result is, and at last
    channel = Script([*plans, *waits, Shutdown()])
    serve(Rank(replace(spec, trace=trace), lambda _: None), channel)
    reports = [message for message in channel.heard if isinstance(message, TraceReport)]
    assert len(reports) == trace
    for report in reports:
        assert [step.step for step in report.steps] == [0, 1]
        assert [each.step for each in report.transfers] == [0, 1]
        assert report.clock.offset_s == 6.75
        assert report.groups == {"stage0": (0,)}


class Record:
    """In place of a runner: what it was asked to do."""

    def __init__(self, fails_at: int = -1) -> None:
        self.calls: list[tuple[str, int]] = []
        self._fails_at = fails_at

    def expect(self, plan: StepPlan) -> None:
        self.calls.append(("expect", plan.step))

    def run(self, plan: StepPlan, on_start: Callable[[], None]) -> Ran:
        if plan.step == self._fails_at:
            raise RuntimeError("no")
        on_start()
        self.calls.append(("run", plan.step))
        return Ran(StageStep(plan.step, 0.0, 0.0), StepResult(plan.step, (7,)))


def calls_of(spec: RankSpec, messages: Sequence[ToRank | None], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    rank, record = Rank(spec, lambda _: None), Record()
    monkeypatch.setattr(rank, "runner", record)
    serve(rank, Script(messages))
    return [f"{name} {step}" for name, step in record.calls]


STEPS = [StepPlan(step=step, decodes=(0,)) for step in range(3)]


def test_the_input_of_the_next_step_is_expected_before_a_step_is_run(
    spec: RankSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calls_of(spec, [*STEPS, Shutdown()], monkeypatch) == [
        "expect 0",
        "expect 1",
        "run 0",
        "expect 2",
        "run 1",
        "run 2",
    ]


def test_a_step_does_not_wait_for_the_one_after_it(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [STEPS[0], None, None, STEPS[1], None, Shutdown()]
    assert calls_of(spec, messages, monkeypatch) == ["expect 0", "run 0", "expect 1", "run 1"]


@pytest.mark.parametrize(
    ("messages", "order"),
    [
        ([*STEPS, Shutdown()], "told 0, run 1, told 1, run 2, told 2"),
        ([STEPS[0], None, None, STEPS[1], None, Shutdown()], "told 0, run 1, told 1"),
    ],
)
def test_a_result_is_told_before_the_next_step_is_computed(
    spec: RankSpec, messages: Sequence[ToRank | None], order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, record, channel = Rank(spec, lambda _: None), Record(), Script(messages)
    monkeypatch.setattr(rank, "runner", record)
    monkeypatch.setattr(
        channel,
        "send",
        lambda message: record.calls.append(("told", message.step)) if isinstance(message, StepResult) else None,
    )
    serve(rank, channel)
    assert ", ".join(f"{name} {step}" for name, step in record.calls if name != "expect") == f"run 0, {order}"


class Late(LateResult):
    """Of a step that a GPU is through with when its result has been asked after so many times, or is waited for."""

    def __init__(self, step: int, record: Record, num_looks: int) -> None:
        self.step, self.record, self.left = step, record, num_looks

    def done(self) -> bool:
        self.left -= 1
        return self.left < 0

    def read(self) -> StepResult:
        self.record.calls.append(("read", self.step))
        return StepResult(self.step, (7,))


@pytest.mark.parametrize(
    ("num_looks", "order"),
    [
        (0, "run 0, read 0, run 1, read 1, run 2, read 2"),  # done before the next step is
        (10**6, "run 0, run 1, read 0, run 2, read 1, read 2"),  # the GPU has the next step by then
    ],
)
def test_the_result_of_a_gpu_is_read_behind_the_next_step(
    spec: RankSpec, num_looks: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank, record, channel = Rank(spec, lambda _: None), Record(), Script([*STEPS, Shutdown()])
    monkeypatch.setattr(rank, "runner", record)
    run = record.run
    monkeypatch.setattr(
        record,
        "run",
        lambda plan, on_start: run(plan, on_start)._replace(result=Late(plan.step, record, num_looks)),
    )
    serve(rank, channel)
    assert ", ".join(f"{name} {step}" for name, step in record.calls if name != "expect") == order
    assert [message.step for message in channel.heard if isinstance(message, StepResult)] == [0, 1, 2]


def test_a_result_of_a_gpu_is_told_while_no_next_step_is_known(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, record, channel = Rank(spec, lambda _: None), Record(), Script([STEPS[0], *[None] * 8, STEPS[1], Shutdown()])
    monkeypatch.setattr(rank, "runner", record)
    run = record.run
    monkeypatch.setattr(
        record, "run", lambda plan, on_start: run(plan, on_start)._replace(result=Late(plan.step, record, 4))
    )
    serve(rank, channel)
    assert [f"{name} {step}" for name, step in record.calls if name != "expect"][:3] == ["run 0", "read 0", "run 1"]


def test_a_step_that_fails_takes_no_result_with_it(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    rank, channel = Rank(spec, lambda _: None), Script([*STEPS, Shutdown()])
    monkeypatch.setattr(rank, "runner", Record(fails_at=1))
    with pytest.raises(RuntimeError, match="no"):
        serve(rank, channel)
    rank.close()
    assert [message.step for message in channel.heard if isinstance(message, StepResult)] == [0]


def test_without_overlap_nothing_is_expected_before_its_turn(spec: RankSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = replace(spec, comm=replace(spec.comm, overlap="none"))
    assert calls_of(apart, [*STEPS, Shutdown()], monkeypatch) == [
        f"{name} {step}" for step in range(3) for name in ("expect", "run")
    ]
