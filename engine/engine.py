"""The engine: holds the only truth about every request, and keeps the ranks supplied with steps."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from phalanx.engine.messages import NewSequence, StepPlan, StepResult
from phalanx.engine.request import Delta, Request, RequestOutput, new_request
from phalanx.engine.sampling_params import SamplingParams
from phalanx.engine.scheduler import Limits, Scheduler
from phalanx.errors import RequestError
from phalanx.models.tokenizer import Tokenizer

POLL_S = 5.0  # how long one wait for a result lasts; failures of ranks end it at once


class Executor(Protocol):
    """The ranks of one replica, wherever they are."""

    def submit(self, plan: StepPlan) -> None:
        """Sends a step to every rank. Returns without waiting for it."""

    def receive(self, timeout_s: float) -> StepResult | None:
        """The next result, or None if none came in time. Raises RankFailedError as soon as a rank has failed."""


class Engine:
    """Turns requests into steps and tokens into text. Whoever follows a request drives it, from any thread."""

    def __init__(
        self,
        executor: Executor,
        limits: Limits,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...] = (),
        tokenizer: Tokenizer | None = None,
        seed: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """seed: of the seeds of requests that bring none; None for fresh ones every time."""
        self._executor = executor
        self._scheduler = Scheduler(limits)
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._seeds = random.Random(seed)
        self._clock = clock
        self._requests: dict[int, Request] = {}
        self._unheard: dict[int, list[Delta]] = {}  # what a step added to requests that others follow
        self._lock = threading.RLock()
        self._next_name = 0

    def add(self, prompt: str | Sequence[int], params: SamplingParams) -> int:
        """Queues a request and returns its number. Raises RequestError, naming the remedy, for one that cannot be
        served.
        """
        if not isinstance(prompt, Sequence) or not (
            isinstance(prompt, str) or all(isinstance(token, int) for token in prompt)
        ):
            raise RequestError(f"a prompt is text or a list of token ids, found {prompt!r:.80}")
        with self._lock:
            return self._add(prompt if isinstance(prompt, str) else list(prompt), params)

    def _add(self, prompt: str | list[int], params: SamplingParams) -> int:
        seed = self._seeds.getrandbits(63)
        request = new_request(
            self._next_name, prompt, params, self._tokenizer, self._eos_token_ids, seed, self._clock()
        )
        for token in request.prompt_token_ids:
            if not 0 <= token < self._vocab_size:
                raise RequestError(f"prompt token {token} is not in the vocabulary (0 to {self._vocab_size - 1})")
        if params.stop and request.stream is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids")
        self._scheduler.add(
            NewSequence(
                sequence=request.name,
                seed=request.seed,
                temperature=params.temperature,
                top_k=min(params.top_k, self._vocab_size),
                top_p=params.top_p,
                min_p=params.min_p,
                logprobs=-1 if params.logprobs is None else params.logprobs,
            ),
            list(request.prompt_token_ids),
            params.max_tokens,
        )
        self._requests[request.name] = request
        self._next_name += 1
        return request.name

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def step(self) -> list[Delta]:
        """Sends what can run, waits for one result, and returns what it added to which request."""
        while (plan := self._scheduler.schedule()) is not None:
            self._executor.submit(plan)
        if not self._scheduler.num_in_flight:
            return []
        result = self._executor.receive(POLL_S)
        if result is None:
            return []
        self._scheduler.complete(result)
        now_s = self._clock()
        deltas = []
        for drawn in result.tokens:
            request = self._requests.get(drawn.sequence)
            if request is None or request.finish_reason is not None:  # aborted while its token was on the way
                continue
            delta = request.push(drawn, now_s)
            deltas.append(delta)
            if delta.finish_reason is not None:
                self._scheduler.finish(request.name)
        return deltas

    def take(self, name: int) -> RequestOutput:
        """The output of a finished request; the engine forgets it."""
        with self._lock:
            return self._requests.pop(name).output()

    def abort(self, name: int) -> None:
        """Ends a request now; whoever follows it hears so. Nothing where there is no such request any more."""
        with self._lock:
            request = self._requests.get(name)
            if request is not None and request.finish_reason is None:
                self._scheduler.finish(name)
                self._unheard.setdefault(name, []).append(request.abort())

    def discard(self, name: int) -> None:
        """Ends a request whose output nobody will take."""
        with self._lock:
            self.abort(name)
            self._requests.pop(name, None)
            self._unheard.pop(name, None)

    def run(self, names: Sequence[int]) -> Generator[Delta, None, None]:
        """Drives the engine until the requests are finished, passing on what is added to them.

        Others may do so at the same time for requests of theirs, in turns or from other threads.
        """
        open_names = list(names)
        try:
            while open_names:
                for delta in self._hear(open_names):
                    if delta.finish_reason is not None:
                        open_names.remove(delta.request)
                    yield delta
        finally:
            for name in open_names:  # the caller stopped listening
                self.discard(name)

    def _hear(self, names: Sequence[int]) -> list[Delta]:
        """What was added to the requests since last asked; takes a step where that is nothing."""
        with self._lock:
            if not any(name in self._unheard for name in names):
                for delta in self.step():
                    self._unheard.setdefault(delta.request, []).append(delta)
            return [delta for name in names for delta in self._unheard.pop(name, ())]
