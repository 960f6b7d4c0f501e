"""`Health`: true only where a token could be produced now."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from phalanx.errors import PhalanxError, QueueFullError
from phalanx.serve import health
from phalanx.serve.health import FRESH_S, STALLED_S, Health


@dataclass
class Replica:
    """What an engine says of one replica. last_s: when it last did a step."""

    last_s: float = 0.0
    running: int = 0
    waiting: int = 0
    failure: Exception | None = None


@dataclass
class FakeEngine:
    replicas: list[Replica]
    answer: Any = None  # of a probe: an error, or seconds that it takes
    num_probes: int = 0
    clock_s: list[float] = field(default_factory=lambda: [1000.0])

    @property
    def failures(self) -> list[Exception | None]:
        return [replica.failure for replica in self.replicas]

    @property
    def failure(self) -> Exception | None:
        return None if None in self.failures else self.failures[-1]

    @property
    def last_results_s(self) -> list[float]:
        return [replica.last_s for replica in self.replicas]

    def replica_stats(self) -> list[Replica]:
        return self.replicas

    async def generate(self, prompt: Any, params: Any, *, priority: int) -> None:
        self.num_probes += 1
        assert params.max_tokens == 1
        await asyncio.sleep(self.answer if isinstance(self.answer, float) else 0.0)
        if isinstance(self.answer, Exception):
            raise self.answer


def problem(engine: FakeEngine, askers: int = 1) -> str | None:
    async def ask() -> str | None:
        checks = Health(engine, clock_s=lambda: engine.clock_s[0])  # type: ignore[arg-type]
        return (await asyncio.gather(*(checks.problem() for _ in range(askers))))[0]

    return asyncio.run(ask())


def test_a_step_done_lately_is_proof_enough() -> None:
    engine = FakeEngine([Replica(last_s=1000 - FRESH_S + 1, running=3)])
    assert problem(engine) is None
    assert engine.num_probes == 0


def test_an_idle_engine_draws_a_token_for_all_who_ask() -> None:
    engine = FakeEngine([Replica()])
    assert problem(engine, askers=5) is None
    assert engine.num_probes == 1


def test_ranks_that_do_not_answer_a_probe_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PROBE_S", 0.05)
    assert "did not draw a token within 0.05 s" in (problem(FakeEngine([Replica()], answer=30.0)) or "")


def test_a_step_may_take_long_but_not_for_ever() -> None:
    slow, stuck = (FakeEngine([Replica(last_s=1000 - STALLED_S + by, running=2)]) for by in (1, -1))
    assert problem(slow) is None
    assert "2 sequences run, but no step was done for 31 s" in (problem(stuck) or "")
    assert slow.num_probes == stuck.num_probes == 0


def test_one_replica_that_can_draw_is_enough() -> None:
    failed = Replica(failure=PhalanxError("rank 1 died"))
    stuck = Replica(last_s=1000 - STALLED_S - 1, running=1)
    assert problem(FakeEngine([failed, Replica(last_s=999)])) is None
    assert problem(FakeEngine([stuck, Replica()])) is None
    assert problem(FakeEngine([failed, failed])) == "rank 1 died"
    assert "no step" in (problem(FakeEngine([failed, stuck])) or "")


@pytest.mark.parametrize(("answer", "words"), [(QueueFullError("full"), None), (PhalanxError("rank 2 died"), "rank 2")])
def test_what_a_probe_meets_is_told(answer: Exception, words: str | None) -> None:
    found = problem(FakeEngine([Replica()], answer=answer))
    assert found is None if words is None else words in (found or "")
