"""What a rank remembers of the sequences between steps: a row of each table for each slot."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phalanx.engine.messages import StepPlan
from phalanx.kernels import plan_attention
from phalanx.models.batch import Batch


class SlotTables:
    """Page tables, lengths and last drawn tokens, kept up to date by step plans.

    last_tokens: [max_sequences] int64 on the device.
    """

    def __init__(
        self, max_sequences: int, max_length: int, page_size: int, window: int | None, device: torch.device
    ) -> None:
        """window: of the attention, in positions, None for all."""
        self._page_size = page_size
        self._window = window
        self._device = device
        # One page more than a sequence can fill: rows are read up to the longest of a step.
        self._pages = torch.zeros((max_sequences, -(-max_length // page_size) + 1), dtype=torch.int64, device=device)
        self._num_pages = [0] * max_sequences
        self._lengths = [0] * max_sequences  # tokens run
        self.last_tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)

    def apply(self, plan: StepPlan) -> None:
        """Takes in the sequences that come and the pages that are added."""
        for new in plan.new:
            self._pages[new.slot, : len(new.pages)] = torch.tensor(new.pages, device=self._device)
            self._num_pages[new.slot] = len(new.pages)
        if plan.pages:
            places = []
            for slot, _ in plan.pages:
                places.append(self._num_pages[slot])
                self._num_pages[slot] += 1
            rows, pages = torch.tensor(plan.pages, device=self._device).unbind(1)
            self._pages[rows, torch.tensor(places, device=self._device)] = pages

    def batch(self, plan: StepPlan) -> Batch:
        """Where each row of the step stands in its sequence and in the cache. Counts the rows as run."""
        size, lengths = self._page_size, self._lengths
        positions = [lengths[slot] for slot in plan.decodes]
        rows = list(plan.decodes)
        slots = list(plan.decodes)
        query_lengths = [1] * len(slots)
        last_rows = list(range(len(slots)))
        for slot in plan.decodes:
            lengths[slot] += 1
        for chunk in plan.chunks:
            count = len(chunk.tokens)
            lengths[chunk.slot] = chunk.start + count
            positions.extend(range(chunk.start, chunk.start + count))
            rows.extend([chunk.slot] * count)
            slots.append(chunk.slot)
            query_lengths.append(count)
            if chunk.sample:
                last_rows.append(len(positions) - 1)
        context_lengths = [lengths[slot] for slot in slots]
        device = self._device
        positions_T = torch.tensor(positions, device=device)
        page_T = self._pages[torch.tensor(rows, device=device), positions_T // size]
        num_pages = -(-max(context_lengths) // size)
        return Batch(
            positions=positions_T,
            slots=page_T * size + positions_T % size,
            attention=plan_attention(
                self._pages[torch.tensor(slots, device=device), :num_pages],
                query_lengths,
                context_lengths,
                page_size=size,
                window=self._window,
                device=device,
            ),
            last_rows=torch.tensor(last_rows, dtype=torch.int64, device=device),
        )

    def lengths_of(self, slots: Sequence[int]) -> list[int]:
        """Tokens run of each: the position of the next."""
        return [self._lengths[slot] for slot in slots]

    def tokens(self, plan: StepPlan) -> torch.Tensor:
        """The token of each row, [T] int64: those last drawn, then those of the chunks."""
        drawn = self.last_tokens[torch.tensor(plan.decodes, dtype=torch.int64, device=self._device)]
        if not plan.chunks:
            return drawn
        known = [token for chunk in plan.chunks for token in chunk.tokens]
        return torch.cat((drawn, torch.tensor(known, device=self._device)))
