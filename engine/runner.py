"""A rank's side of a step: from the plan to hidden states handed on, or tokens drawn."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from phalanx.comm.communicator import Communicator
from phalanx.engine.messages import NewSequence, StepPlan, StepResult
from phalanx.engine.sampler import Sampler
from phalanx.models.batch import Batch, KVCache
from phalanx.models.decoder import Decoder
from phalanx.parallel.handover import HandOver
from phalanx.parallel.layout import Stage


@dataclass(slots=True)
class SequenceState:
    """What a rank remembers of a sequence between steps: how to draw for it, and where its keys and values lie."""

    request: NewSequence
    pages: list[int] = field(default_factory=list)


class StepRunner:
    """Runs step plans on one rank. The same plan runs on every rank of the replica, in the same order."""

    def __init__(
        self,
        stage: Stage,
        comm: Communicator,
        decoder: Decoder,
        cache: KVCache,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        before: HandOver | None,
        after: HandOver | None,
    ) -> None:
        """comm: of the stage. before, after: the borders to the neighbouring stages, None at the pipeline's ends."""
        self._stage = stage
        self._comm = comm
        self._decoder = decoder
        self._cache = cache
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._before = before
        self._after = after
        self._sampler = Sampler(stage.vocab, comm) if stage.last else None
        self._sequences: dict[int, SequenceState] = {}

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> StepResult | None:
        """Computes this rank's share of a step; the first rank of the last stage returns the tokens drawn."""
        started = time.perf_counter()
        for sequence in plan.dropped:
            self.forget(sequence)
        for request in plan.new:
            self._sequences[request.sequence] = SequenceState(request)
        batch = self._batch(plan)
        hidden = self._decoder(self._input(plan), batch, self._cache)
        if self._after is not None:
            self._after.send(hidden)
        if self._sampler is None:
            return None
        drawing = [work for work in plan.work if work.sample]
        tokens = []
        if drawing:
            tokens = self._sampler.sample(
                self._decoder.logits(hidden, batch.last_rows),
                [self._sequences[work.sequence].request for work in drawing],
                [work.start + len(work.tokens) for work in drawing],
            )
        if self._comm.rank != 0:
            return None
        return StepResult(plan.step, tuple(tokens), (time.perf_counter() - started) * 1e6)

    def forget(self, sequence: int) -> None:
        """Drops what this rank remembers of a sequence; its pages may be another's from the next step on."""
        del self._sequences[sequence]

    def _input(self, plan: StepPlan) -> torch.Tensor:
        if self._before is not None:
            num_tokens = sum(len(work.tokens) for work in plan.work)
            return self._before.receive(num_tokens, self._hidden_size, self._dtype, self._device)
        return torch.tensor([token for work in plan.work for token in work.tokens], device=self._device)

    def _batch(self, plan: StepPlan) -> Batch:
        page_size = self._cache.page_size
        positions: list[int] = []
        slots: list[int] = []
        last_rows: list[int] = []
        query_starts = [0]
        for work in plan.work:
            pages = self._sequences[work.sequence].pages
            pages.extend(work.pages)
            span = range(work.start, work.start + len(work.tokens))
            positions.extend(span)
            slots.extend(pages[position // page_size] * page_size + position % page_size for position in span)
            query_starts.append(len(positions))
            if work.sample:
                last_rows.append(len(positions) - 1)
        device = self._device
        return Batch(
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            query_starts=query_starts,
            context_lengths=[work.start + len(work.tokens) for work in plan.work],
            page_tables=[torch.tensor(self._sequences[work.sequence].pages, device=device) for work in plan.work],
            last_rows=torch.tensor(last_rows, dtype=torch.int64, device=device),
        )
