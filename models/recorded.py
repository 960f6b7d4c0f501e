"""Steps of few tokens as recordings: there the interpreter would take a quarter of the time and more.

Shapes: T tokens of a step, H hidden size, V vocabulary rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch

from phalanx.kernels import Arena, PagePlan, Recording
from phalanx.models.batch import KVCache, Part

MOST_TOKENS = 64  # with more, products take their time and the interpreter's share is small


class Passed(NamedTuple):
    """What comes out of a stage. hidden: [T, H]. logits: [T, V] of all tokens, where they were asked for.
    normed: [T, H], behind the last norm, in place of logits of which another rank makes some.
    """

    hidden: torch.Tensor
    logits: torch.Tensor | None = None
    normed: torch.Tensor | None = None


Pass = Callable[[torch.Tensor, Part, KVCache, Recording, bool], Passed]


class _Step(NamedTuple):
    """A recorded step, and where it finds its input and leaves its result. x: as for `RecordedSteps`."""

    recording: Recording
    x: torch.Tensor
    part: Part
    passed: Passed


class RecordedSteps:
    """The way of a step's tokens through a stage, recorded for each number of tokens that comes again.

    run: makes that way with what it is given, and no tensor beside; under `Recording.record`.
    """

    most_logits: ClassVar[float] = 2**21  # entries: those of more rows have no memory between steps

    def __init__(self, run: Pass) -> None:
        self._run = run
        self._arena = Arena()
        self._cache: KVCache | None = None
        # By number of tokens, whether their part is kept, and whether logits are asked for; None for what came once.
        self._steps: dict[tuple[int, bool, bool], _Step | None] = {}
        self._inputs: tuple[torch.Tensor, ...] = ()  # of all recordings, which take the first rows

    def __call__(self, x: torch.Tensor, part: Part, cache: KVCache, with_logits: bool) -> Passed | None:
        """What is behind the layers, in memory of the next steps too; None for a step that nothing is gained on, or not
        yet.

        x: one row a token, of the same shape and dtype in all steps.
        """
        num_tokens, attention = len(x), part.attention
        if num_tokens > MOST_TOKENS or not isinstance(attention, PagePlan):
            return None
        if self._cache is not cache:
            self.forget()
            self._cache = cache
        like = num_tokens, part.kept, with_logits
        if like not in self._steps:
            self._steps[like] = None
            return None
        step = self._steps[like]
        if step is None:
            step = self._steps[like] = self._record(x, part, cache, with_logits)
        for place, given in ((step.x, x), (step.part.positions, part.positions), (step.part.slots, part.slots)):
            if place.data_ptr() != given.data_ptr():
                place.copy_(given)
        assert isinstance(step.part.attention, PagePlan)
        if step.part.attention is not attention:
            step.part.attention.steps.become(attention.steps)
        step.recording.replay()
        return step.passed

    def forget(self) -> None:
        """Lets go of all steps, and of the cache that they know."""
        self._cache, self._steps = None, {}

    def _record(self, x: torch.Tensor, part: Part, cache: KVCache, with_logits: bool) -> _Step:
        if not self._inputs:
            given = (x, part.positions, part.slots)
            self._inputs = tuple(each.new_empty((MOST_TOKENS, *each.shape[1:])) for each in given)
        own_x, positions, slots = (each[: len(x)] for each in self._inputs)
        if not part.kept:
            assert isinstance(part.attention, PagePlan)
            part = Part(positions, slots, replace(part.attention, steps=part.attention.steps.copy()))
        if not part.kept or x.dim() > 1:  # hidden states come from another stage, each time in memory of their own
            x = own_x
        recording = Recording(self._arena)
        with recording.record():
            passed = self._run(x, part, cache, recording, with_logits)
        return _Step(recording, x, part, passed)
