"""Which sequences run in the next step: a pure state machine, without torch, clock or I/O."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import msgspec

from phalanx.engine.messages import Chunk, NewSequence, Sampling, StepPlan, StepResult, TokenLogprobs
from phalanx.engine.pages import PagePool, PrefixPage
from phalanx.engine.sequence import ScheduledSequence
from phalanx.errors import ContextLengthError, RequestError

Ending = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a step and the sequences in flight.

    max_sequences: sequences running at a time. max_batch_tokens: tokens in one step. num_pages, page_size: KV pages,
    and tokens in one. max_length: prompt and new tokens of a sequence. num_stages: stages to keep busy. max_waiting:
    sequences that may wait, None for any number. keep_prefixes: whether prompts may use what others have computed.
    step_tokens: tokens that a stage computes on in the time that a step costs it beside, mostly by reading the weights.
    """

    max_sequences: int
    max_batch_tokens: int
    num_pages: int
    page_size: int
    max_length: int
    num_stages: int = 1
    max_waiting: int | None = None
    keep_prefixes: bool = True
    step_tokens: int = 64


class Stepped(NamedTuple):
    """What a step brought: a token for each of the sequences named, and how those ended that did.

    logprobs: of the tokens of sequences that ask. prompt_logprobs: sequence, position, and those of the prompt's tokens
    behind that position.
    """

    names: list[int]
    tokens: list[int]
    endings: dict[int, Ending]
    logprobs: dict[int, TokenLogprobs]
    prompt_logprobs: list[tuple[int, int, tuple[TokenLogprobs, ...]]]


class SchedulerStats(NamedTuple):
    """running, waiting: sequences now. pages_used: by running sequences now; pages_kept: prefixes that nobody uses now.
    Since the start: prompt_tokens of the sequences admitted, prompt_tokens_cached of them found in the prefix tree,
    preemptions, steps.
    """

    running: int
    waiting: int
    pages: int
    pages_used: int
    pages_kept: int
    prompt_tokens: int
    prompt_tokens_cached: int
    preemptions: int
    steps: int


class _Step(NamedTuple):
    """A step in flight. drawn: whose tokens it draws, in order. prompt_starts: sequence and position of the chunks that
    log-probabilities are asked for, by place in the step.
    """

    drawn: list[ScheduledSequence]
    prompt_starts: dict[int, tuple[int, int]]


class _Cohort(NamedTuple):
    """Decoding sequences that drew in the same step."""

    step: int
    sequences: list[ScheduledSequence]


class _Draft:
    """A plan in the making."""

    def __init__(self) -> None:
        self.new: list[NewSequence] = []
        self.decoding: list[ScheduledSequence] = []
        self.chunks: list[Chunk] = []
        self.drawing: list[ScheduledSequence] = []  # of the chunks
        self.again: list[ScheduledSequence] = []  # of both, those that have more to draw
        self.prompt_starts: dict[int, tuple[int, int]] = {}


class Scheduler:
    """Continuous batching over paged memory; by priority, then first come, first served.

    Plans are made ahead of results: one step more is in flight than there are stages, so that no stage waits for the
    engine. A sequence whose token is on its way is planned once more, never twice; the ranks know its token before the
    engine does. Since ranks run plans in order, pages and slots are free for the next plan the moment a sequence ends,
    whatever is still in flight.

    With several stages the decoding sequences are dealt evenly over as many micro-batches, and a sequence comes back
    when the others have had their turn: its token has then left the last stage. That keeps the slowest stage busy
    whatever the others take. Prompts are dealt out evenly too; the chunks of one follow each other without waiting,
    since a stage needs nothing of the last one but its own keys and values.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._pool = PagePool(limits.num_pages, limits.page_size)
        self._free_slots = list(range(limits.max_sequences - 1, -1, -1))
        self._unfinished: dict[int, ScheduledSequence] = {}
        self._waiting: list[
            tuple[tuple[int, int], ScheduledSequence]
        ] = []  # a heap; finished ones are dropped when met
        self._running: dict[int, ScheduledSequence] = {}
        self._priorities: dict[int, int] = {}  # how many running sequences have which
        self._prefilling: list[ScheduledSequence] = []  # running ones with a backlog
        self._cohorts: deque[_Cohort] = deque()  # oldest first; finished sequences are dropped when met
        self._num_decoding = 0  # those included whose token must be known before they are planned again
        self._growing: list[
            ScheduledSequence
        ] = []  # running ones whose pages are full, or will be with a token on its way
        self._pages: list[tuple[int, int]] = []  # slots and the pages they have grown by, for the next plan
        self._backlog = 0  # of all sequences
        self._chunk_tokens = 0  # of prompts in a micro-batch, while there is a backlog
        self._blocked: tuple[int, int, int] | None = None  # a sequence that did not fit, and beside what
        self._in_flight: dict[int, _Step] = {}
        self._step = 0
        self._num_arrived = 0
        self._num_guided = 0
        self._num_preemptions = 0
        self._num_prompt_tokens = 0
        self._num_cached_tokens = 0
        self._admitted: list[tuple[int, int]] = []  # sequences, and tokens that they found computed

    # ---- what is going on ----

    @property
    def num_in_flight(self) -> int:
        """Steps planned whose results are not in."""
        return len(self._in_flight)

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def num_waiting(self) -> int:
        return len(self._unfinished) - len(self._running)

    def stats(self) -> SchedulerStats:
        return SchedulerStats(
            running=len(self._running),
            waiting=self.num_waiting,
            pages=self._limits.num_pages,
            pages_used=self._limits.num_pages - self._pool.num_available,
            pages_kept=self._pool.num_kept,
            prompt_tokens=self._num_prompt_tokens,
            prompt_tokens_cached=self._num_cached_tokens,
            preemptions=self._num_preemptions,
            steps=self._step,
        )

    # ---- events ----

    def check(self, num_prompt: int, max_tokens: int) -> None:
        """Raises RequestError, with figures, for a request that could never run."""
        limits = self._limits
        if num_prompt < 1:
            raise RequestError("the prompt has no tokens; give at least one")
        length = num_prompt + max_tokens
        if length > limits.max_length:
            raise ContextLengthError(
                f"the prompt has {num_prompt} tokens and asks for {max_tokens} more, {length} in all, but at most "
                f"{limits.max_length} fit; shorten the prompt, lower max_tokens or raise model.max_length"
            )
        capacity = limits.num_pages * limits.page_size
        if length > capacity:
            raise ContextLengthError(
                f"the prompt and its new tokens are {length} tokens, but the KV cache holds {capacity}; "
                f"raise engine.kv_cache or shorten the request"
            )

    def add(
        self,
        name: int,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: Sampling,
        *,
        stop_tokens: Collection[int] = (),
        priority: int = 0,
        mask: bytes | None = None,
    ) -> None:
        """Queues a sequence that `check` has passed. It ends by itself at a stop token or after `max_tokens`.

        priority: lower comes first. mask: of its first token, for a sequence each of whose tokens needs one; `allow`
        gives the others.
        """
        order = (priority, self._num_arrived)
        sequence = ScheduledSequence(name, order, prompt, max_tokens, sampling, stop_tokens, mask)
        self._num_arrived += 1
        self._num_guided += sequence.guided
        self._unfinished[name] = sequence
        self._backlog += sequence.backlog
        heapq.heappush(self._waiting, (order, sequence))

    def allow(self, name: int, mask: bytes) -> None:
        """Says what a guided sequence may draw next, now that its last token is known. To be said before `schedule`."""
        sequence = self._unfinished.get(name)
        if sequence is not None:
            sequence.mask = mask
            if sequence.decoding:
                self._cohorts.appendleft(_Cohort(self._step - self._limits.num_stages, [sequence]))

    def complete(self, result: StepResult) -> Stepped:
        """Takes the tokens of the oldest step in flight. Those of sequences that ended meanwhile are left out."""
        drawn, prompt_starts = self._in_flight.pop(result.step)
        tokens = list(result.tokens)
        logprobs = {drawn[place].name: found for place, found in result.logprobs}
        prompt_logprobs = [(*prompt_starts[place], found) for place, found in result.prompt_logprobs]
        if any(sequence.finished for sequence in drawn):
            kept = [pair for pair in zip(drawn, tokens, strict=True) if not pair[0].finished]
            drawn, tokens = [sequence for sequence, _ in kept], [token for _, token in kept]
        endings: dict[int, Ending] = {}
        for sequence, token in zip(drawn, tokens, strict=True):
            sequence.pending -= 1
            known = sequence.tokens
            known.append(token)
            if len(known) >= sequence.due or token in sequence.stop_tokens:
                self._settle(sequence, endings)
        return Stepped([sequence.name for sequence in drawn], tokens, endings, logprobs, prompt_logprobs)

    def take_admitted(self) -> list[tuple[int, int]]:
        """Sequences that plans have admitted for the first time since the last call, and how many tokens of their
        prompts others had computed.
        """
        admitted, self._admitted = self._admitted, []
        return admitted

    def finish(self, name: int) -> None:
        """Ends a sequence at once: the next plan may use its pages and its slot. Nothing where it has ended already."""
        sequence = self._unfinished.get(name)
        if sequence is not None:
            self._end(sequence)

    # ---- plans ----

    def schedule(self) -> StepPlan | None:
        """The next step, or None where as many are in flight as may be, or nothing can run."""
        if len(self._in_flight) > self._limits.num_stages:
            return None
        draft = _Draft()
        if self._growing:
            self._grow()
        self._make_way()
        self._add_decodes(draft, early=False)
        if self._backlog:
            self._add_chunks(draft)
        if not draft.decoding and not draft.chunks:
            self._add_decodes(draft, early=True)
        if not draft.decoding and not draft.chunks:
            return None
        if draft.again:
            self._cohorts.append(_Cohort(self._step, draft.again))
        drawn = draft.decoding + draft.drawing
        masks = [(each.slot, each.mask) for each in drawn if each.mask is not None] if self._num_guided else ()
        plan = StepPlan(
            step=self._step,
            new=tuple(draft.new),
            pages=tuple(self._pages),
            decodes=tuple([sequence.slot for sequence in draft.decoding]),
            chunks=tuple(draft.chunks),
            masks=tuple(masks),
        )
        self._pages.clear()
        self._in_flight[self._step] = _Step(drawn, draft.prompt_starts)
        self._step += 1
        return plan

    def _add_decodes(self, draft: _Draft, *, early: bool) -> None:
        """A micro-batch's share of the decoding sequences.

        early: those too whose tokens will not have left the last stage when the step begins, once each.
        """
        limits, cohorts = self._limits, self._cohorts
        room = min(-(-self._num_decoding // limits.num_stages), limits.max_batch_tokens)
        newest = self._step - (1 if early else limits.num_stages)
        group: list[ScheduledSequence] = []
        while cohorts and room and cohorts[0].step <= newest:
            step, members = cohorts.popleft()
            members = [sequence for sequence in members if sequence.decoding]
            if early and any(sequence.pending > 1 for sequence in members):
                cohorts.appendleft(_Cohort(step, members))
                break
            if len(members) > room:
                cohorts.appendleft(_Cohort(step, members[room:]))
                members = members[:room]
            group += members
            room -= len(members)
        for sequence in group:
            sequence.pending += 1
            sequence.draws_left = left = sequence.draws_left - 1
            if not left:
                self._stop_decoding(sequence)
        draft.decoding = group
        draft.again += [sequence for sequence in group if sequence.decoding and not sequence.guided]

    def _add_chunks(self, draft: _Draft) -> None:
        """A micro-batch's share of the tokens that are known and not planned; admits sequences for it."""
        limits = self._limits
        budget = limits.max_batch_tokens - len(draft.decoding)
        if limits.num_stages > 1:
            # Chunks of R tokens in all, equal lest stages wait for each other, of the size T that makes the sum of
            # R/T + stages - 1 steps least, of T + step_tokens: small ones read the weights often, large ones fill the
            # pipeline late.
            best = math.isqrt(self._backlog * limits.step_tokens // (limits.num_stages - 1))
            self._chunk_tokens = max(self._chunk_tokens, limits.step_tokens, best)
            budget = min(budget, self._chunk_tokens)
        for sequence in list(self._prefilling):
            if budget > 0:
                budget -= self._add_chunk(draft, sequence, budget)
        while budget > 0 and (admitted := self._admit(draft)) is not None:
            budget -= self._add_chunk(draft, admitted, budget)
        if not self._backlog:
            self._chunk_tokens = 0

    def _add_chunk(self, draft: _Draft, sequence: ScheduledSequence, budget: int) -> int:
        tokens, start = sequence.tokens, sequence.length
        size = min(sequence.backlog, budget)
        stop = start + size
        sample = stop == len(tokens)
        asks_logprobs = sequence.sampling.prompt_logprobs >= 0 and start < sequence.num_prompt - 1
        if asks_logprobs:
            draft.prompt_starts[len(draft.chunks)] = (sequence.name, start)
        following = tokens[stop] if asks_logprobs and not sample else -1
        draft.chunks.append(Chunk(sequence.slot, start, tuple(tokens[start:stop]), sample, following))
        sequence.length = stop
        sequence.backlog -= size
        self._backlog -= size
        self._share(sequence, stop)
        if sample:
            self._prefilling.remove(sequence)
            draft.drawing.append(sequence)
            sequence.pending += 1
            sequence.draws_left = sequence.end - stop - 1
            self._watch(sequence)
            if sequence.draws_left:
                sequence.decoding = True
                self._num_decoding += 1
                if not sequence.guided:
                    draft.again.append(sequence)
        return size

    # ---- admission ----

    def _admit(self, draft: _Draft) -> ScheduledSequence | None:
        """Gives the first waiting sequence a slot and pages for all of its known tokens, if there are."""
        sequence = self._first_waiting()
        if sequence is None:
            return None
        found = self._fitting(sequence)
        if found is None:
            return None
        heapq.heappop(self._waiting)
        size, known = self._limits.page_size, len(sequence.tokens)
        self._pool.use(found)
        own = self._pool.allocate(-(-known // size) - len(found))
        sequence.prefix = found
        sequence.own.extend(own)
        sequence.capacity = (len(found) + len(own)) * size
        sequence.length = len(found) * size
        self._set_backlog(sequence, known - sequence.length)
        sequence.slot = self._free_slots.pop()
        self._running[sequence.name] = sequence
        priority = sequence.order[0]
        self._priorities[priority] = self._priorities.get(priority, 0) + 1
        self._prefilling.append(sequence)
        if not sequence.admitted:
            sequence.admitted = True
            self._num_prompt_tokens += known
            self._num_cached_tokens += sequence.length
            self._admitted.append((sequence.name, sequence.length))
        pages = (*[page.page for page in found], *own)
        draft.new.append(NewSequence(sequence.slot, pages, self._sampling(sequence)))
        return sequence

    def _fitting(self, sequence: ScheduledSequence) -> list[PrefixPage] | None:
        """The pages that hold the beginning of a waiting sequence, or None where the rest of it has no room."""
        beside = (sequence.name, self._pool.num_available, len(self._running))
        if sequence.pending or not self._free_slots or self._blocked == beside:
            return None
        found, wanted = self._wanted(sequence, self._running.values())
        if wanted > self._pool.num_available:
            self._blocked = beside
            return None
        return found

    def _wanted(self, sequence: ScheduledSequence, others: Iterable[ScheduledSequence]) -> tuple[list[PrefixPage], int]:
        """The pages that hold the beginning of a waiting sequence, and how many must be available for it to be admitted
        beside others: what these may grow by in a page's worth of steps stays free, lest it be preempted at once.
        """
        known, size = len(sequence.tokens), self._limits.page_size
        # The last known token is run in any case, since the next is drawn from it; all are whose logits are asked for.
        found = self._pool.match(sequence.tokens, 0 if sequence.sampling.prompt_logprobs >= 0 else (known - 1) // size)
        growth = sum(each.capacity < each.end - 1 for each in others)
        return found, -(-known // size) - len(found) + self._pool.num_unused(found) + growth

    def _make_way(self) -> None:
        """Where a waiting sequence does not fit, less urgent running ones give way to it, if that helps."""
        sequence = self._first_waiting()
        if sequence is None or sequence.pending or max(self._priorities, default=0) <= sequence.order[0]:
            return
        if self._fitting(sequence) is not None:
            return
        stay: list[ScheduledSequence] = []
        yielding: list[ScheduledSequence] = []
        for each in self._running.values():
            (yielding if each.order[0] > sequence.order[0] else stay).append(each)
        freed = sum(
            len(each.own) + len(each.spare) + sum(page.num_users == 1 for page in each.prefix) for each in yielding
        )
        if self._wanted(sequence, stay)[1] > self._pool.num_available + freed:
            return
        for each in sorted(yielding, key=lambda each: each.order, reverse=True):
            self._preempt(each)
            if self._fitting(sequence) is not None:
                return

    def _first_waiting(self) -> ScheduledSequence | None:
        while self._waiting:
            sequence = self._waiting[0][1]
            if not sequence.finished:
                return sequence
            heapq.heappop(self._waiting)
        return None

    def _sampling(self, sequence: ScheduledSequence) -> Sampling:
        """What the ranks are told; after a preemption, with what was drawn before."""
        sampling = sequence.sampling
        if len(sequence.tokens) == sequence.num_prompt:
            return sampling
        history = tuple(sequence.tokens) if sampling.history else ()
        return msgspec.structs.replace(sampling, history=history, prompt_logprobs=-1)

    # ---- pages ----

    def _grow(self) -> None:
        """A page more for each sequence that needs one. Where there is none the youngest gives way, be it itself."""
        for sequence in self._growing:
            while sequence.slot >= 0:
                if self._pool.num_available:
                    [page] = self._pool.allocate(1)
                    sequence.own.append(page)
                    sequence.capacity += self._limits.page_size
                    self._pages.append((sequence.slot, page))
                    break
                self._preempt(max(self._running.values(), key=lambda each: each.order))
        self._growing.clear()

    def _share(self, sequence: ScheduledSequence, planned: int) -> None:
        """Lets others use the pages that are full with the first `planned` tokens, which are known and planned."""
        size, prefix = self._limits.page_size, sequence.prefix
        while self._limits.keep_prefixes and (start := len(prefix) * size) + size <= planned:
            page = sequence.own.popleft()
            shared = self._pool.share(page, prefix[-1] if prefix else None, sequence.tokens[start : start + size])
            if shared.page != page:
                sequence.spare.append(page)
            prefix.append(shared)

    def _watch(self, sequence: ScheduledSequence) -> None:
        """Sees to the page of the next token but one, and when to look again: a page is full, or all is drawn."""
        known = len(sequence.tokens)
        if known >= sequence.capacity < sequence.end - 1:
            self._growing.append(sequence)
        size = self._limits.page_size
        sequence.due = min(sequence.end, known + 1 if known % size == 0 else -(-known // size) * size)

    def _settle(self, sequence: ScheduledSequence, endings: dict[int, Ending]) -> None:
        """After a token that ends the sequence, or fills a page, or comes behind a full one."""
        known = len(sequence.tokens)
        if sequence.tokens[-1] in sequence.stop_tokens:
            endings[sequence.name] = "stop"
            self._end(sequence)
        elif known == sequence.end:
            endings[sequence.name] = "length"
            self._end(sequence)
        elif sequence.slot >= 0:
            self._share(sequence, known - 1)  # all tokens before this one have been planned
            self._watch(sequence)

    # ---- endings ----

    def _preempt(self, sequence: ScheduledSequence) -> None:
        """Takes a sequence's place away. It waits in its old order, to be run again from all of its tokens."""
        for cohort in self._cohorts:
            if sequence in cohort.sequences:
                cohort.sequences.remove(sequence)
        self._leave(sequence)
        self._set_backlog(sequence, len(sequence.tokens))
        self._num_preemptions += 1
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def _end(self, sequence: ScheduledSequence) -> None:
        sequence.finished = True
        del self._unfinished[sequence.name]
        self._num_guided -= sequence.guided
        if sequence.slot >= 0:
            self._leave(sequence)
        self._set_backlog(sequence, 0)

    def _leave(self, sequence: ScheduledSequence) -> None:
        """Frees the slot and the pages of a running sequence."""
        del self._running[sequence.name]
        priority = sequence.order[0]
        self._priorities[priority] -= 1
        if not self._priorities[priority]:
            del self._priorities[priority]
        if sequence.backlog:
            self._prefilling.remove(sequence)
        self._stop_decoding(sequence)
        if self._pages:
            self._pages = [each for each in self._pages if each[0] != sequence.slot]
        self._free_slots.append(sequence.slot)
        sequence.slot = -1
        self._pool.release(sequence.prefix, (*sequence.own, *sequence.spare))
        sequence.prefix = []
        sequence.own.clear()
        sequence.spare.clear()
        sequence.capacity = sequence.length = 0

    def _stop_decoding(self, sequence: ScheduledSequence) -> None:
        self._num_decoding -= sequence.decoding
        sequence.decoding = False

    def _set_backlog(self, sequence: ScheduledSequence, backlog: int) -> None:
        self._backlog += backlog - sequence.backlog
        sequence.backlog = backlog
