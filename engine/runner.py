"""A rank's side of a step: from the plan to hidden states handed on, or tokens drawn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from phalanx.comm.gpu import Gpu
from phalanx.engine.feedback import TokenReceiver, TokenSender
from phalanx.engine.late_result import Drawn, LateResult
from phalanx.engine.logprobs import LogprobRows
from phalanx.engine.messages import Chunk, StageStep, StepPlan, StepResult
from phalanx.engine.sampler import Draws, Sampler
from phalanx.engine.tables import SlotTables
from phalanx.models.batch import KVCache
from phalanx.models.decoder import Decoder
from phalanx.parallel.handover import HandOver
from phalanx.parallel.shared_head import HeadAsker, HeadHelper

LOGPROB_ROWS = 64  # rows of a prompt whose logits are held at a time


class Links(NamedTuple):
    """A rank's connections to other stages, None where there is nothing to connect.

    before, after: the borders to the neighbouring stages. tokens_in: on the first stage of several. tokens_out: on the
    last of several. head_helper, head_asker: on the first and the last that share the head.
    """

    before: HandOver | None = None
    after: HandOver | None = None
    tokens_in: TokenReceiver | None = None
    tokens_out: TokenSender | None = None
    head_helper: HeadHelper | None = None
    head_asker: HeadAsker | None = None


class Ran(NamedTuple):
    """times: of the stage's work, or of handing it to a GPU. result: from one rank of the last stage, else None."""

    times: StageStep
    result: StepResult | LateResult | None


class StepRunner:
    """Runs step plans on one rank. The same plan runs on every rank of the replica, in the same order."""

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        tables: SlotTables,
        sampler: Sampler | None,
        links: Links,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        reports: bool,
        drains: bool = False,
        gpu: Gpu | None = None,
    ) -> None:
        """sampler: on the last stage. reports: whether this rank returns the step's result. drains: whether a step ends
        when what it hands on has left, not before. gpu: that runs behind this thread; None where the device does not.
        """
        self._decoder = decoder
        self._cache = cache
        self._tables = tables
        self._sampler = sampler
        self._links = links
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._reports = reports
        self._drains = drains
        self._gpu = gpu
        self._plain: set[int] = set()  # slots, see `Sampling.plain`
        self._prompt_logprobs: dict[int, int] = {}  # of the slots that ask for them
        self._no_tokens = torch.zeros(0, dtype=torch.int64, device=device)

    def expect(self, plan: StepPlan) -> None:
        """Makes ready for what the stage before hands over for a step: it may come while an earlier step is computed.

        To be called in the order of steps; `run` does so where nobody has.
        """
        if self._links.before is not None:
            self._links.before.expect(plan.num_tokens, self._hidden_size, self._dtype, self._device)

    @torch.inference_mode()
    def run(self, plan: StepPlan, on_start: Callable[[], None] | None = None) -> Ran:
        """Computes this rank's share of a step. on_start: called once that is prepared, and only computing is left."""
        began_s = time.perf_counter()
        self._note_new(plan)
        self._tables.apply(plan)
        batch = self._tables.batch(plan, self._decoder.num_parts(plan.num_tokens))  # while the input is on its way
        if on_start is not None:
            on_start()
        asked_s = time.perf_counter()
        x = self._input(plan)
        waited_s = time.perf_counter() - asked_s
        hidden = self._decoder(x, batch, self._cache)
        result = None
        if self._sampler is not None:
            result = self._draw(plan, hidden, batch.last_rows, self._sampler)
        if self._links.after is not None:
            asked_s = time.perf_counter()
            self._links.after.flush()  # what was sent before, which takes long where the next stage is far behind
            waited_s += time.perf_counter() - asked_s
            self._links.after.send(hidden)
        if self._links.head_helper is not None:
            self._expect_rows(plan, self._links.head_helper)
        ended_s = time.perf_counter()
        num_tokens, num_decodes = plan.num_tokens, len(plan.decodes)
        ran = Ran(StageStep(plan.step, began_s + waited_s, ended_s, waited_s, num_tokens, num_decodes), result)
        if self._drains and self._links.after is not None:
            self._links.after.flush()
        return ran

    def _input(self, plan: StepPlan) -> torch.Tensor:
        """Tokens on the first stage, hidden states elsewhere; waits until they are there."""
        before, tokens_in = self._links.before, self._links.tokens_in
        if before is not None:
            if not before.num_expected:
                self.expect(plan)
            return before.receive()
        if tokens_in is not None:
            tokens_in.collect(plan.decodes, self._tables.last_tokens)
            tokens_in.expect(plan.step, plan.drawn_slots)
        return self._tables.tokens(plan)

    def _draw(
        self, plan: StepPlan, hidden: torch.Tensor, last_rows: torch.Tensor | None, sampler: Sampler
    ) -> StepResult | LateResult | None:
        for new in plan.new:
            sampler.admit(new.slot, new.sampling)
        slots = plan.drawn_slots
        drawn = Drawn(self._no_tokens)
        if slots:
            draws = self._draws(plan, hidden, last_rows, sampler)
            if self._links.tokens_out is not None:
                self._links.tokens_out.send(draws.tokens)
            else:
                self._tables.note(slots, draws.tokens)
            drawn = Drawn(*draws)
        if self._prompt_logprobs:
            drawn = drawn._replace(prompts=self._prompt(plan, hidden, sampler))
        if not self._reports:
            return None
        return drawn.result(plan.step) if self._gpu is None else LateResult(plan.step, drawn, self._gpu)

    def _draws(self, plan: StepPlan, hidden: torch.Tensor, last_rows: torch.Tensor | None, sampler: Sampler) -> Draws:
        if not self._is_plain(plan):
            slots = plan.drawn_slots
            logits = self._decoder.logits(hidden, last_rows)
            return sampler.sample(logits, slots, self._tables.lengths_of(slots), dict(plan.masks))
        if self._links.head_asker is not None:
            return sampler.likeliest_by_keys(self._decoder.largest_keys(hidden, last_rows))
        return sampler.likeliest(self._decoder.logits(hidden, last_rows))

    def _prompt(
        self, plan: StepPlan, hidden: torch.Tensor, sampler: Sampler
    ) -> tuple[tuple[int, tuple[LogprobRows, ...]], ...]:
        """Log-probabilities of the prompts' tokens, by the place of their chunk."""
        found: dict[int, list[LogprobRows]] = {}
        for place, first, part in self._prompt_parts(plan):
            rows = torch.arange(first, first + len(part), device=self._device)
            logits = self._decoder.logits(hidden, rows)
            num_top = self._prompt_logprobs[plan.chunks[place].slot]
            found.setdefault(place, []).append(sampler.prompt_logprobs(logits, part, num_top))
        return tuple((place, tuple(logprobs)) for place, logprobs in found.items())

    def _prompt_parts(self, plan: StepPlan) -> Iterator[tuple[int, int, tuple[int, ...]]]:
        """What of them passes the head at a time: the place of a chunk, the first row in the step, and the tokens that
        follow on this row and those behind it.
        """
        row = len(plan.decodes)
        for place, chunk in enumerate(plan.chunks):
            if chunk.slot in self._prompt_logprobs:
                following = _following(chunk)
                for start in range(0, len(following), LOGPROB_ROWS):
                    yield place, row + start, following[start : start + LOGPROB_ROWS]
            row += len(chunk.tokens)

    def _expect_rows(self, plan: StepPlan, helper: HeadHelper) -> None:
        """Tells what `_draw` asks on the last stage, in that order."""
        prompts = [len(part) for _, _, part in self._prompt_parts(plan)]
        for num_rows, keys in ((len(plan.drawn_slots), self._is_plain(plan)), *((rows, False) for rows in prompts)):
            if num_rows:
                helper.expect(plan.step, (num_rows, self._hidden_size), self._dtype, keys=keys)

    def _is_plain(self, plan: StepPlan) -> bool:
        """Whether all that a step draws is each sequence's likeliest token."""
        return not plan.masks and self._plain.issuperset(plan.drawn_slots)

    def _note_new(self, plan: StepPlan) -> None:
        for new in plan.new:
            (self._plain.add if new.sampling.plain else self._plain.discard)(new.slot)
            self._prompt_logprobs.pop(new.slot, None)
            if new.sampling.prompt_logprobs >= 0:
                self._prompt_logprobs[new.slot] = new.sampling.prompt_logprobs


def _following(chunk: Chunk) -> tuple[int, ...]:
    """The known token after each of the chunk's, as far as there is one."""
    return chunk.tokens[1:] if chunk.following < 0 else (*chunk.tokens[1:], chunk.following)
