"""What a rank remembers of the sequences between steps: a row of each table for each slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from phalanx.engine.messages import StepPlan
from phalanx.kernels import plan_attention
from phalanx.models.batch import Batch, Part


class _Run(NamedTuple):
    """New tokens of a sequence: `num_rows` of them, from position `start` on."""

    slot: int
    start: int
    num_rows: int


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

    def batch(self, plan: StepPlan, num_parts: int = 1) -> Batch:
        """Where each row of the step stands in its sequence and in the cache, in parts of about as many rows. Counts
        the rows as run.
        """
        lengths = self._lengths
        runs = [_Run(slot, lengths[slot], 1) for slot in plan.decodes]
        last_rows = list(range(len(runs)))
        num_rows = len(runs)
        for chunk in plan.chunks:
            runs.append(_Run(chunk.slot, chunk.start, len(chunk.tokens)))
            num_rows += len(chunk.tokens)
            if chunk.sample:
                last_rows.append(num_rows - 1)
        for run in runs:
            lengths[run.slot] = run.start + run.num_rows
        bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
        parts = tuple(self._part(some) for some in _split(runs, [stop - start for start, stop in pairwise(bounds)]))
        return Batch(parts, torch.tensor(last_rows, dtype=torch.int64, device=self._device))

    def _part(self, runs: Sequence[_Run]) -> Part:
        size, device = self._page_size, self._device
        positions: list[int] = []
        rows: list[int] = []
        for slot, start, count in runs:
            positions.extend(range(start, start + count))
            rows.extend([slot] * count)
        context_lengths = [run.start + run.num_rows for run in runs]
        positions_T = torch.tensor(positions, device=device)
        page_T = self._pages[torch.tensor(rows, device=device), positions_T // size]
        num_pages = -(-max(context_lengths) // size)
        return Part(
            positions=positions_T,
            slots=page_T * size + positions_T % size,
            attention=plan_attention(
                self._pages[torch.tensor([run.slot for run in runs], device=device), :num_pages],
                [run.num_rows for run in runs],
                context_lengths,
                page_size=size,
                window=self._window,
                device=device,
            ),
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


def _split(runs: Sequence[_Run], sizes: Sequence[int]) -> Iterator[list[_Run]]:
    """Runs of so many rows in turn; one that does not fit goes on in the next part."""
    rest = list(reversed(runs))
    for size in sizes:
        part: list[_Run] = []
        room = size
        while room:
            run = rest.pop()
            taken = min(room, run.num_rows)
            part.append(run._replace(num_rows=taken))
            if taken < run.num_rows:
                rest.append(run._replace(start=run.start + taken, num_rows=run.num_rows - taken))
            room -= taken
        yield part
