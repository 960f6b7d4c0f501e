"""Penalties on tokens that a sequence has already: what occurred in it, and how they change its logits.

With c the occurrences of a token in the output: a logit x becomes x / r, or x * r below 0, where the token is in the
prompt or the output (repetition penalty r; Keskar et al. 2019, https://arxiv.org/abs/1909.05858), and then
x - f * c - p * [c > 0] (frequency penalty f and presence penalty p, as the OpenAI API defines them).

Shapes: B rows, V vocabulary rows of this rank, P rows that have a penalty.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from phalanx.engine.messages import Sampling
from phalanx.engine.vocab_shard import VocabShard, blocks, on_device

IN_PROMPT = 1
DRAWN = 2  # added each time: a mark is twice the occurrences in the output, plus one for a token of the prompt


class Penalties:
    """The tokens that occurred in the slots that have a penalty, on this rank's vocabulary rows only."""

    def __init__(self, shard: VocabShard, device: torch.device) -> None:
        self._rows = shard.rows
        self._marks = torch.zeros(0, shard.rows.size, dtype=torch.int32, device=device)  # a row an entry
        self._entries: dict[int, int] = {}  # by slot
        self._free: list[int] = []
        self._factors: dict[int, tuple[float, float, float]] = {}

    def admit(self, slot: int, sampling: Sampling) -> None:
        """A sequence takes a slot, with its `history`."""
        factors = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if factors == (1, 0, 0):
            if slot in self._entries:
                self._free.append(self._entries.pop(slot))
            return
        if slot not in self._entries:
            self._entries[slot] = self._free.pop() if self._free else self._grow()
        self._factors[slot] = factors
        history_T = np.array(sampling.history, np.int64)
        marks_V = self._marks[self._entries[slot]].zero_()
        output_T = self._held(history_T[sampling.num_prompt :])
        marks_V.index_add_(0, output_T, torch.full_like(output_T, DRAWN, dtype=torch.int32))
        marks_V[self._held(history_T[: sampling.num_prompt])] += IN_PROMPT

    def concern(self, slots: Sequence[int]) -> bool:
        """Whether any of these slots has a penalty."""
        return not self._entries.keys().isdisjoint(slots)

    def apply(self, logits_BV: torch.Tensor, slots: Sequence[int]) -> None:
        """Changes the rows of slots that have a penalty, in place."""
        rows = self._penalised(slots)
        if not rows:
            return
        rows_P = on_device(np.array(rows), logits_BV)
        entries_P = on_device(np.array([self._entries[slots[row]] for row in rows]), logits_BV)
        factors_P3 = on_device(np.array([self._factors[slots[row]] for row in rows], np.float32), logits_BV)
        for block in blocks(len(rows), logits_BV):
            marks_PV = self._marks[entries_P[block]]
            repetition_P1, frequency_P1, presence_P1 = factors_P3[block].tensor_split(3, 1)
            x_PV = logits_BV[rows_P[block]]
            repeated_PV = torch.where(x_PV < 0, x_PV * repetition_P1, x_PV / repetition_P1)
            x_PV = torch.where(marks_PV > 0, repeated_PV, x_PV)
            count_PV = marks_PV >> 1  # over DRAWN, without the slow division of integers
            logits_BV[rows_P[block]] = x_PV.sub_(frequency_P1 * count_PV).sub_(presence_P1 * (count_PV > 0))

    def record(self, slots: Sequence[int], tokens_B: torch.Tensor) -> None:
        """A token was drawn for each of these slots."""
        rows = self._penalised(slots)
        if not rows:
            return
        entries_P = on_device(np.array([self._entries[slots[row]] for row in rows]), tokens_B)
        column_P = tokens_B[on_device(np.array(rows), tokens_B)] - self._rows.start
        held_P = (column_P >= 0) & (column_P < self._rows.size)
        place_P = entries_P * self._rows.size + column_P.clamp(0, self._rows.size - 1)
        self._marks.view(-1).index_add_(0, place_P, (held_P * DRAWN).int())

    def _penalised(self, slots: Sequence[int]) -> list[int]:
        return [row for row, slot in enumerate(slots) if slot in self._entries]

    def _held(self, tokens_T: npt.NDArray[np.int64]) -> torch.Tensor:
        """Columns of the tokens that this rank holds."""
        held_T = (tokens_T >= self._rows.start) & (tokens_T < self._rows.stop)
        return on_device(tokens_T[held_T] - self._rows.start, self._marks)

    def _grow(self) -> int:
        """Twice the entries; returns the first new one, the others are free."""
        num_entries = self._marks.shape[0]
        added = max(1, num_entries)
        self._marks = torch.cat((self._marks, self._marks.new_zeros(added, self._rows.size)))
        self._free.extend(range(num_entries + added - 1, num_entries, -1))
        return num_entries
