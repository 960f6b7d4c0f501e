"""Ranks without tensors, to run plans against: what a slot of a KV page holds is a digest of all tokens up to there."""

from __future__ import annotations

from collections.abc import Sequence

from phalanx.engine.messages import StepPlan, StepResult
from phalanx.engine.scheduler import Limits

VOCAB = 50


def digest(before: int, token: int) -> int:
    return hash((before, token))


def next_token(state: int) -> int:
    """What this model draws behind these tokens."""
    return state % VOCAB


def one_by_one(prompt: Sequence[int], max_tokens: int, stop_tokens: Sequence[int] = ()) -> list[int]:
    """What a sequence draws that runs alone."""
    state = 0
    for token in prompt:
        state = digest(state, token)
    drawn: list[int] = []
    while len(drawn) < max_tokens:
        token = next_token(state)
        drawn.append(token)
        if token in stop_tokens:
            break
        state = digest(state, token)
    return drawn


class ModelRanks:
    """Runs plans in order as ranks do, and finds what they could not run rightly."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cache: dict[tuple[int, int], int] = {}  # by page and offset
        self.tables: dict[int, list[int]] = {}  # by slot, as all that follows
        self.states: dict[int, list[int]] = {}  # after each token
        self.last_tokens: dict[int, int] = {}
        self.num_plans = 0

    def run(self, plan: StepPlan) -> StepResult:
        assert plan.step == self.num_plans, "plans come in order"
        self.num_plans += 1
        assert 0 < plan.num_tokens <= self.limits.max_batch_tokens
        for new in plan.new:
            assert 0 <= new.slot < self.limits.max_sequences
            self.tables[new.slot] = list(new.pages)
            self.states[new.slot] = []
            self.last_tokens.pop(new.slot, None)
        for slot, page in plan.pages:
            self.tables[slot].append(page)
        slots = [*plan.decodes, *(chunk.slot for chunk in plan.chunks)]
        assert len(slots) == len(set(slots)), "a sequence is in a step twice"
        # As in a layer: all keys and values of a step are written before any are read.
        for slot in plan.decodes:
            self._write(slot, len(self.states[slot]), [self.last_tokens[slot]])
        for chunk in plan.chunks:
            self._write(chunk.slot, chunk.start, chunk.tokens)
        for slot in slots:
            assert self._read(slot, len(self.states[slot])) == self.states[slot], "a page in use was written to"
        drawing = [*plan.decodes, *(chunk.slot for chunk in plan.chunks if chunk.sample)]
        drawn = [next_token(self.states[slot][-1]) for slot in drawing]
        self.last_tokens.update(zip(drawing, drawn, strict=True))
        return StepResult(plan.step, tuple(drawn))

    def _write(self, slot: int, start: int, tokens: Sequence[int]) -> None:
        assert tokens
        states = self.states[slot]
        if not states and start:  # a prefix that others have computed
            states.extend(self._read(slot, start))
        assert len(states) == start
        for token in tokens:
            states.append(digest(states[-1] if states else 0, token))
            position = len(states) - 1
            self.cache[self._place(slot, position)] = states[-1]

    def _read(self, slot: int, length: int) -> list[int]:
        return [self.cache[self._place(slot, position)] for position in range(length)]

    def _place(self, slot: int, position: int) -> tuple[int, int]:
        page = self.tables[slot][position // self.limits.page_size]
        assert 0 <= page < self.limits.num_pages
        return page, position % self.limits.page_size
