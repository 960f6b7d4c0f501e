"""Which sequences run in the next step: a pure state machine, without torch, clock or I/O."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from phalanx.engine.messages import NewSequence, SequenceWork, StepPlan, StepResult
from phalanx.errors import RequestError


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and the sequences in flight.

    max_sequences: sequences admitted at a time. max_batch_tokens: tokens in one step. num_pages, page_size: KV pages,
    and tokens in one. max_length: prompt and new tokens of a sequence. num_stages: stages to keep busy; as many steps
    may be in flight.
    """

    max_sequences: int
    max_batch_tokens: int
    num_pages: int
    page_size: int
    max_length: int
    num_stages: int = 1


@dataclass(slots=True)
class Sequence:
    """A request as the scheduler sees it: its tokens, and how far the ranks have come with them."""

    request: NewSequence
    tokens: list[int]
    max_tokens: int
    pages: list[int] = field(default_factory=list)
    num_prompt: int = 0
    num_computed: int = 0
    num_pages_sent: int = 0
    in_flight: bool = False
    finished: bool = False

    @property
    def name(self) -> int:
        return self.request.sequence


class Scheduler:
    """First come, first served; a sequence is admitted once all pages it can ever need are free, so it always ends.

    Long prompts are cut into chunks under the token budget. With several stages the running sequences are dealt over as
    many steps in flight, so that each stage has one to work on.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._free_pages = list(range(limits.num_pages - 1, -1, -1))
        self._waiting: deque[Sequence] = deque()
        self._running: dict[int, Sequence] = {}
        self._dropped: list[int] = []
        self._in_flight: dict[int, list[Sequence]] = {}
        self._step = 0

    @property
    def num_in_flight(self) -> int:
        """Steps sent whose results are not in."""
        return len(self._in_flight)

    @property
    def num_unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def check(self, num_prompt: int, max_tokens: int) -> None:
        """Raises RequestError, with figures, for a request that could never run."""
        if num_prompt < 1:
            raise RequestError("the prompt has no tokens; give at least one")
        length = num_prompt + max_tokens
        if length > self._limits.max_length:
            raise RequestError(
                f"the prompt has {num_prompt} tokens and asks for {max_tokens} more, {length} in all, but at most "
                f"{self._limits.max_length} fit; shorten the prompt, lower max_tokens or raise model.max_length"
            )
        capacity = self._limits.num_pages * self._limits.page_size
        if length > capacity:
            raise RequestError(
                f"the prompt and its new tokens are {length} tokens, but the KV cache holds {capacity}; "
                f"raise engine.kv_cache or shorten the request"
            )

    def add(self, request: NewSequence, prompt: list[int], max_tokens: int) -> None:
        """Queues a request. Raises RequestError for one that could never run."""
        self.check(len(prompt), max_tokens)
        self._waiting.append(Sequence(request, list(prompt), max_tokens, num_prompt=len(prompt)))

    def schedule(self) -> StepPlan | None:
        """The next step, or None where all that could run is in flight already or the pipeline is full."""
        if len(self._in_flight) >= self._limits.num_stages:
            return None
        new = self._admit()
        ready = [sequence for sequence in self._running.values() if not sequence.in_flight]
        # An equal share of the running sequences for each step in flight, rounded up.
        share = -(-len(self._running) // self._limits.num_stages)
        budget = self._limits.max_batch_tokens
        work: list[SequenceWork] = []
        members: list[Sequence] = []
        for sequence in ready[:share]:
            if budget == 0:
                break
            start = sequence.num_computed
            tokens = tuple(sequence.tokens[start : start + budget])
            budget -= len(tokens)
            last = start + len(tokens)
            pages = tuple(sequence.pages[sequence.num_pages_sent : -(-last // self._limits.page_size)])
            work.append(SequenceWork(sequence.name, start, tokens, pages, sample=last == len(sequence.tokens)))
            sequence.num_computed = last
            sequence.num_pages_sent += len(pages)
            sequence.in_flight = True
            members.append(sequence)
        if not work:
            return None
        plan = StepPlan(self._step, tuple(new), tuple(work), tuple(self._dropped))
        self._in_flight[self._step] = members
        self._dropped = []
        self._step += 1
        return plan

    def _admit(self) -> list[NewSequence]:
        admitted = []
        while self._waiting and len(self._running) < self._limits.max_sequences:
            sequence = self._waiting[0]
            num_pages = -(-(sequence.num_prompt + sequence.max_tokens) // self._limits.page_size)
            if num_pages > len(self._free_pages):
                break
            self._waiting.popleft()
            sequence.pages = [self._free_pages.pop() for _ in range(num_pages)]
            self._running[sequence.name] = sequence
            admitted.append(sequence.request)
        return admitted

    def complete(self, result: StepResult) -> None:
        """Takes the tokens of a step; one finished meanwhile is forgotten, since nothing of it is in flight now."""
        for sequence in self._in_flight.pop(result.step):
            sequence.in_flight = False
            if sequence.finished:
                self._forget(sequence)
        for drawn in result.tokens:
            if drawn.sequence in self._running:
                self._running[drawn.sequence].tokens.append(drawn.token)

    def finish(self, name: int) -> None:
        """Ends a sequence: its pages are free as soon as no step in flight works on it."""
        for waiting in self._waiting:
            if waiting.name == name:
                self._waiting.remove(waiting)
                return
        running = self._running.get(name)
        if running is None:
            return
        running.finished = True
        if not running.in_flight:
            self._forget(running)

    def _forget(self, sequence: Sequence) -> None:
        del self._running[sequence.name]
        self._free_pages.extend(reversed(sequence.pages))
        self._dropped.append(sequence.name)
