"""The engine: holds the only truth about every request, and keeps the ranks supplied with steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from typing import Protocol

import msgspec

from phalanx.engine.comm_book import CommBook
from phalanx.engine.guide import next_mask
from phalanx.engine.messages import CommReport, Report, StageReport, StepPlan, StepResult
from phalanx.engine.request import Event, Request, Track
from phalanx.engine.sampling_params import check_tokens, completion_seed, sampling_for
from phalanx.engine.scheduler import Limits, Scheduler, Stepped
from phalanx.engine.stats import WINDOW_S, EngineStats, Rate
from phalanx.engine.timeline import Timeline
from phalanx.engine.trace_book import TraceBook
from phalanx.errors import QueueFullError, RequestError


class Executor(Protocol):
    """The ranks of one replica, wherever they are. Used from one thread but for `wake`."""

    def submit(self, plan: StepPlan) -> None:
        """Sends a step to every rank. Returns without waiting for it."""

    def receive(self, timeout_s: float) -> StepResult | Report | None:
        """The next message, or None if none came in time or `wake` was called. Raises RankFailedError as soon as a rank
        has failed.
        """

    def wake(self) -> None:
        """Ends a `receive` that waits, or the next one. From any thread."""


class Engine:
    """Turns requests into steps, and tokens into text. Used from one thread, but for `stats` and the checks."""

    def __init__(
        self, executor: Executor, limits: Limits, vocab_size: int, *, clock_s: Callable[[], float] = time.perf_counter
    ) -> None:
        self._executor = executor
        self._limits = limits
        self._scheduler = Scheduler(limits)
        self._vocab_size = vocab_size
        self._clock_s = clock_s
        self.timeline = Timeline(limits.num_stages)
        self.comm_book = CommBook()
        self.trace_book = TraceBook()
        self.profiled: Container[int] = ()  # steps that ranks are to look at; may be set from any thread
        self.last_result_s = clock_s()  # when a step was last known to be done
        self._rate = Rate(clock_s)
        self._tracks: dict[int, Track] = {}  # unfinished ones, by the names of their sequences
        self._guided: set[int] = set()
        self._num_sequences = 0
        self._num_requests = 0
        self._num_finished = 0
        self._num_aborted = 0
        self._num_tokens = 0

    def check(self, request: Request) -> None:
        """Raises RequestError, naming the remedy, for a request that cannot be served."""
        self._scheduler.check(len(request.prompt_token_ids), request.params.max_tokens)
        prompt, end = request.prompt_token_ids, self._vocab_size
        if min(prompt) < 0 or max(prompt) >= end:  # at the speed of C: prompts are long, and callers have event loops
            token = next(token for token in prompt if not 0 <= token < end)
            raise RequestError(f"prompt token {token} is not in the vocabulary (0 to {end - 1})")
        check_tokens(request.params, self._vocab_size)

    def check_room(self, num_open: int, count: int) -> None:
        """Raises QueueFullError where so many completions more would have too many wait beside those that are open."""
        running, waiting = self._limits.max_sequences, self._limits.max_waiting
        if waiting is not None and count > running + waiting:
            raise RequestError(
                f"{count} completions at once are more than the {running} that may run (engine.max_sequences) and the "
                f"{waiting} that may wait (engine.max_waiting) together; send fewer at a time"
            )
        if waiting is not None and num_open + count > running + waiting:
            raise QueueFullError(
                f"{num_open} completions are running or waiting; {count} more would exceed the {running} that may run "
                f"(engine.max_sequences) and the {waiting} that may wait (engine.max_waiting); try again later"
            )

    def add(self, request: Request) -> None:
        """Queues a request that `check` has passed."""
        params, prompt = request.params, request.prompt_token_ids
        masks = [None if track.guide is None else next_mask(track.guide, self._vocab_size) for track in request.tracks]
        self._num_requests += 1
        for track, mask in zip(request.tracks, masks, strict=True):
            track.name = self._num_sequences
            self._num_sequences += 1
            self._tracks[track.name] = track
            if mask is not None:
                self._guided.add(track.name)
            sampling = sampling_for(
                params,
                seed=completion_seed(request.seed, track.index),
                prompt=prompt,
                stop_tokens=request.stop_tokens,
                vocab_size=self._vocab_size,
            )
            if track.index:  # the prompt is the same for all
                sampling = msgspec.structs.replace(sampling, prompt_logprobs=-1)
            self._scheduler.add(
                track.name,
                prompt,
                params.max_tokens,
                sampling,
                stop_tokens=request.stop_tokens,
                priority=request.priority,
                mask=mask,
            )

    def abort(self, request: Request) -> list[Event]:
        """Ends a request now and frees all that it holds. Nothing where it has ended already."""
        return self._abort(request, None)

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._scheduler.num_unfinished or self._scheduler.num_in_flight)

    def step(self, timeout_s: float) -> list[Event]:
        """Sends what can run, waits for one message, and returns what it brought."""
        self._submit()
        message = self._executor.receive(timeout_s)
        while isinstance(message, Report):
            if isinstance(message, StageReport):
                self.timeline.add(message)
            elif isinstance(message, CommReport):
                self.comm_book.add(message)
            else:
                self.trace_book.add(message)
            message = self._executor.receive(0.0)
        if message is None:
            return []
        self.last_result_s = self._clock_s()
        stepped = self._scheduler.complete(message)
        events = self._guide(stepped) if self._guided else []
        self._submit()  # the ranks go on while the text is made
        return events + self._deliver(stepped)

    def stats(self) -> EngineStats:
        scheduler = self._scheduler.stats()
        now_s = self._clock_s()
        return EngineStats(
            running=scheduler.running,
            waiting=scheduler.waiting,
            pages=scheduler.pages,
            pages_used=scheduler.pages_used,
            pages_kept=scheduler.pages_kept,
            tokens_per_s=self._rate.per_s(),
            stage_busy=self.timeline.busy(now_s - WINDOW_S, now_s),
            requests=self._num_requests,
            finished=self._num_finished,
            aborted=self._num_aborted,
            prompt_tokens=scheduler.prompt_tokens,
            prompt_tokens_cached=scheduler.prompt_tokens_cached,
            output_tokens=self._num_tokens,
            preemptions=scheduler.preemptions,
            steps=scheduler.steps,
        )

    def _submit(self) -> None:
        while (plan := self._scheduler.schedule()) is not None:
            if plan.step in self.profiled:
                plan = msgspec.structs.replace(plan, profiled=True)
            self._executor.submit(plan)
            if plan.new:
                now_s = self._clock_s()
                for name, num_cached in self._scheduler.take_admitted():
                    self._tracks[name].admit(now_s, num_cached)

    def _guide(self, stepped: Stepped) -> list[Event]:
        """Asks the guides of those that have drawn what they may draw next."""
        events = []
        for name, token in zip(stepped.names, stepped.tokens, strict=True):
            if name in self._guided and name not in stepped.endings:
                guide = self._tracks[name].guide
                assert guide is not None
                try:
                    guide.accept(token)
                    self._scheduler.allow(name, next_mask(guide, self._vocab_size))
                except Exception as error:  # a guide is the caller's code: it ends its own request, not the engine
                    events += self._abort(self._tracks[name].request, error)
        return events

    def _deliver(self, stepped: Stepped) -> list[Event]:
        now_s = self._clock_s()
        self._num_tokens += len(stepped.tokens)
        self._rate.count(len(stepped.tokens))
        for name, start, found in stepped.prompt_logprobs:
            if name in self._tracks:
                self._tracks[name].request.prompt_logprobs[start:] = found  # anew where a preemption came between
        events = []
        for name, token in zip(stepped.names, stepped.tokens, strict=True):
            track = self._tracks.get(name)
            if track is None:  # its guide has failed in this very step
                continue
            delta = track.push(token, stepped.logprobs.get(name), stepped.endings.get(name), now_s)
            events.append(Event(track.request, delta))
            if delta.finish_reason is not None:
                self._forget(track)
                if track.request.finished:
                    self._num_finished += 1
                    events.append(Event(track.request, track.request.output()))
        return events

    def _abort(self, request: Request, error: Exception | None) -> list[Event]:
        open_tracks = [track for track in request.tracks if track.name in self._tracks]  # none of one that was refused
        if not open_tracks:
            return []
        self._num_aborted += 1
        events = []
        for track in open_tracks:
            self._forget(track)
            events.append(Event(request, track.abort()))
        return [*events, Event(request, request.output())] if error is None else [Event(request, error)]

    def _forget(self, track: Track) -> None:
        self._scheduler.finish(track.name)
        self._guided.discard(track.name)
        self._tracks.pop(track.name, None)
