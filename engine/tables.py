"""What a rank remembers of the sequences between steps: a row of each table for each slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from phalanx.engine.messages import StepPlan
from phalanx.engine.vocab_shard import on_device
from phalanx.kernels import (
    AttentionPlan,
    PagePlan,
    PlanRoom,
    fill_token_places,
    plan_attention,
    plan_room,
    token_places,
)
from phalanx.models.batch import Batch, Part


class _Run(NamedTuple):
    """New tokens of a sequence: `num_rows` of them, from position `start` on."""

    slot: int
    start: int
    num_rows: int


class _KeptRows:
    """Memory for the rows of steps of so many drawn tokens and nothing else: a recorded step finds them there."""

    def __init__(self, num_rows: int) -> None:
        self.places = torch.empty((2, num_rows), dtype=torch.int64)
        self.tokens = torch.empty(num_rows, dtype=torch.int64)
        self.into_tokens = _numbers(self.tokens)
        self.ones = [1] * num_rows
        self.part: Part | None = None  # once there was a step


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
        # In main memory, for NumPy: of a few numbers it makes its arrays in a tenth of the time that torch takes. One
        # page more than a sequence can fill: rows are read up to the longest of a step.
        self._pages = np.zeros((max_sequences, -(-max_length // page_size) + 1), np.int64)
        self._page_tables = torch.from_numpy(self._pages)
        self._num_pages = [0] * max_sequences
        self._lengths = [0] * max_sequences  # tokens run
        self.last_tokens = torch.zeros(max_sequences, dtype=torch.int64, device=device)
        self._kept: dict[int, _KeptRows] = {}  # by number of rows
        self._rooms = [plan_room(*self._pages.shape, device)]  # of a step's parts
        # For the interpreter, to which a number of it costs less than a call of NumPy with cold caches.
        on_host = device.type == "cpu" and self._rooms[0] is None
        self._last = _numbers(self.last_tokens) if on_host else None
        self._brought: Sequence[int] = ()  # slots of the step, if they are the rows of its only part's plan

    def apply(self, plan: StepPlan) -> None:
        """Takes in the sequences that come and the pages that are added."""
        for new in plan.new:
            self._pages[new.slot, : len(new.pages)] = new.pages
            self._num_pages[new.slot] = len(new.pages)
        for slot, page in plan.pages:
            self._pages[slot, self._num_pages[slot]] = page
            self._num_pages[slot] += 1

    def batch(self, plan: StepPlan, num_parts: int = 1) -> Batch:
        """Where each row of the step stands in its sequence and in the cache, in parts of about as many rows. Counts
        the rows as run.
        """
        lengths = self._lengths
        if not plan.chunks and num_parts == 1 and self._last is not None:
            return Batch((self._kept_part(plan.decodes),), None)
        runs = [_Run(slot, lengths[slot], 1) for slot in plan.decodes]
        last_rows = list(range(len(runs))) if plan.chunks else None
        num_rows = len(runs)
        for chunk in plan.chunks:
            runs.append(_Run(chunk.slot, chunk.start, len(chunk.tokens)))
            num_rows += len(chunk.tokens)
            if last_rows is not None and chunk.sample:
                last_rows.append(num_rows - 1)
        for run in runs:
            lengths[run.slot] = run.start + run.num_rows
        bounds = [num_rows * part // num_parts for part in range(num_parts + 1)]
        sizes = [stop - start for start, stop in pairwise(bounds)]
        parts = tuple(self._part(number, some) for number, some in enumerate(_split(runs, sizes)))
        if last_rows is None:
            self._brought = plan.decodes if num_parts == 1 else ()
            return Batch(parts, None)
        self._brought = ()
        return Batch(parts, on_device(np.array(last_rows, np.int64), self.last_tokens))

    def _part(self, number: int, runs: Sequence[_Run]) -> Part:
        rows = [run.slot for run in runs]
        counts = [run.num_rows for run in runs]
        lengths = [run.start + run.num_rows for run in runs]
        size, device = self._page_size, self._device
        attention = self._attention(rows, counts, lengths, self._room(number))
        positions, slots = token_places(
            self._page_tables, rows, counts, lengths, page_size=size, device=device, plan=attention
        )
        return Part(positions, slots, attention)

    def _room(self, number: int) -> PlanRoom | None:
        """Of a part of a step."""
        while number >= len(self._rooms):
            self._rooms.append(plan_room(*self._pages.shape, self._device))
        return self._rooms[number]

    def _kept_part(self, slots: Sequence[int]) -> Part:
        """A token of each."""
        kept = self._kept_rows(len(slots))
        lengths = [self._lengths[slot] + 1 for slot in slots]
        for slot, length in zip(slots, lengths, strict=True):
            self._lengths[slot] = length
        fill_token_places(kept.places, self._page_tables, slots, kept.ones, lengths, page_size=self._page_size)
        if kept.part is not None and isinstance(kept.part.attention, PagePlan):
            kept.part.attention.move(slots, lengths)
        else:
            positions, page_slots = kept.places
            kept.part = Part(positions, page_slots, self._attention(slots, kept.ones, lengths), kept=True)
        return kept.part

    def _kept_rows(self, num_rows: int) -> _KeptRows:
        kept = self._kept.get(num_rows)
        if kept is None:
            kept = self._kept[num_rows] = _KeptRows(num_rows)
        return kept

    def _attention(
        self, rows: Sequence[int], counts: Sequence[int], lengths: Sequence[int], room: PlanRoom | None = None
    ) -> AttentionPlan:
        return plan_attention(
            self._page_tables,
            counts,
            lengths,
            page_size=self._page_size,
            window=self._window,
            device=self._device,
            rows=rows,
            room=room,
        )

    def note(self, slots: Sequence[int], tokens: torch.Tensor) -> None:
        """tokens: [B] int64, those just drawn for `slots`."""
        if self._last is not None:
            for slot, token in zip(slots, tokens.tolist(), strict=True):
                self._last[slot] = token
        else:
            self.last_tokens[self._rows_of(slots)] = tokens

    def lengths_of(self, slots: Sequence[int]) -> list[int]:
        """Tokens run of each: the position of the next."""
        return [self._lengths[slot] for slot in slots]

    def tokens(self, plan: StepPlan) -> torch.Tensor:
        """The token of each row, [T] int64: those last drawn, then those of the chunks."""
        if self._last is not None and not plan.chunks:
            kept = self._kept_rows(len(plan.decodes))
            for row, slot in enumerate(plan.decodes):
                kept.into_tokens[row] = self._last[slot]
            return kept.tokens
        drawn = self.last_tokens.index_select(0, self._rows_of(plan.decodes))
        if not plan.chunks:
            return drawn
        known = [token for chunk in plan.chunks for token in chunk.tokens]
        return torch.cat((drawn, on_device(np.array(known, np.int64), drawn)))

    def _rows_of(self, slots: Sequence[int]) -> torch.Tensor:
        """In `last_tokens`; what the plan of the step has brought to the device is not brought again."""
        room = self._rooms[0]
        if room is not None and slots == self._brought:
            return room.rows[: len(slots)]
        return on_device(np.array(slots, np.int64), self.last_tokens)


def _numbers(x: torch.Tensor) -> memoryview[int]:
    """Those of a vector in main memory, int64."""
    return memoryview(x.numpy())  # type: ignore[arg-type]  # NumPy's stubs do not say so before Python 3.12


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
