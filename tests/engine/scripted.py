"""An engine whose ranks are a script and whose tokens are bytes."""

from __future__ import annotations

import itertools
import queue
from collections import deque
from collections.abc import Callable
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from phalanx.engine.driver import EngineDriver
from phalanx.engine.engine import Engine
from phalanx.engine.messages import StageReport, StepPlan, StepResult
from phalanx.engine.request import Delta, Event, Request, RequestOutput, new_request
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.scheduler import Limits
from phalanx.models.tokenizer import Tokenizer, byte_alphabet

EOS = 256
VOCAB = 257


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then an end-of-text token."""
    vocabulary = {character: byte for byte, character in byte_alphabet().items()}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, source="test", eos_token_ids=(EOS,), eos_token="<end>")


TOKENIZER = byte_tokenizer()


class Script:
    """Ranks that draw what `draw(slot, position)` says, or what a mask leaves: its first token.

    failing_from: the step from which on they fail.
    """

    def __init__(self, draw: Callable[[int, int], int], failing_from: int | None = None) -> None:
        self._draw = draw
        self._failing_from = failing_from
        self._lengths: dict[int, int] = {}
        self._results: deque[StepResult | StageReport] = deque()
        self.plans: list[StepPlan] = []
        self.messages = queue.SimpleQueue[StepResult | StageReport | None]()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        for slot in plan.decodes:
            self._lengths[slot] += 1
        for chunk in plan.chunks:
            self._lengths[chunk.slot] = chunk.start + len(chunk.tokens)
        masks = {slot: int.from_bytes(mask, "little") for slot, mask in plan.masks}
        tokens = [
            (masks[slot] & -masks[slot]).bit_length() - 1 if slot in masks else self._draw(slot, self._lengths[slot])
            for slot in plan.drawn_slots
        ]
        self.messages.put(StepResult(plan.step, tuple(tokens)))

    def receive(self, timeout_s: float) -> StepResult | StageReport | None:
        if self._failing_from is not None and len(self.plans) > self._failing_from:
            raise RuntimeError("the script's ranks have failed")
        try:
            return self.messages.get(timeout_s > 0, timeout_s)
        except queue.Empty:
            return None

    def wake(self) -> None:
        self.messages.put(None)


class Inbox:
    """A mailbox that a test looks into."""

    def __init__(self) -> None:
        self._events = queue.SimpleQueue[list[Event]]()

    def put(self, events: list[Event]) -> None:
        self._events.put(events)

    def until_end(self, timeout_s: float = 20.0) -> list[Delta | RequestOutput]:
        """All that comes up to the first whole output; raises the error that comes instead."""
        heard: list[Delta | RequestOutput] = []
        while True:
            for event in self._events.get(timeout=timeout_s):
                if isinstance(event.what, Exception):
                    raise event.what
                heard.append(event.what)
            if isinstance(heard[-1], RequestOutput):
                return heard


class Served:
    """An engine with its driver over a script."""

    def __init__(
        self,
        draw: Callable[[int, int], int],
        *,
        num_stages: int = 1,
        failing_from: int | None = None,
        max_sequences: int = 8,
        max_waiting: int | None = None,
    ) -> None:
        self.script = Script(draw, failing_from)
        limits = Limits(max_sequences, 64, 64, 4, 100, num_stages, max_waiting=max_waiting)
        self.engine = Engine(self.script, limits, VOCAB)
        self.driver = EngineDriver(self.engine, self.script)
        self._names = itertools.count()

    def request(
        self, prompt: Any = "?", params: SamplingParams | None = None, *, priority: int = 0, seed: int = 0
    ) -> tuple[Request, Inbox]:
        inbox = Inbox()
        request = new_request(
            prompt,
            params or SamplingParams(),
            name=str(next(self._names)),
            place=0,
            tokenizer=TOKENIZER,
            eos_token_ids=(EOS,),
            seed=seed,
            priority=priority,
            mailbox=inbox,
            now_s=0.0,
        )
        return request, inbox

    def submit(self, prompt: Any = "?", params: SamplingParams | None = None) -> tuple[Request, Inbox]:
        request, inbox = self.request(prompt, params)
        self.engine.check(request)
        self.driver.submit(request)
        return request, inbox

    def complete(self, params: SamplingParams, prompt: Any = "?") -> tuple[RequestOutput, list[Delta]]:
        *deltas, output = self.submit(prompt, params)[1].until_end()
        assert isinstance(output, RequestOutput)
        return output, [delta for delta in deltas if isinstance(delta, Delta)]

    def close(self) -> None:
        self.driver.close()


def saying(text: bytes, prompt_length: int = 1, **options: Any) -> Served:
    """An engine that says this text, then the end of it."""
    said = [*text, EOS]
    return Served(lambda _, position: said[min(position - prompt_length, len(text))], **options)
