"""What a GPU must know of a step to attend: built on the host, and brought over in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import numpy as np
import torch

FIELDS = 4
"""Numbers that are kept of a sequence: first row of its new tokens, how many they are, all of its tokens, and what to
add to the number of one of its pages to find it in the list of pages.
"""


class PlanRoom:
    """Memory of the device that plans of steps lie in, at the same addresses every time: what a CUDA graph captured of
    one step attends right in any other whose plan was brought here.

    A plan is brought in the order of the stream's work, so it may be made while an earlier step is still computed, but
    no two plans of one step may lie in one room.
    """

    def __init__(self, max_sequences: int, max_pages: int, device: torch.device) -> None:
        """max_pages: of all sequences of a step."""
        self.max_sequences = max_sequences
        self.max_pages = max_pages
        self.device = device
        self._first_page = (FIELDS + 1) * max_sequences  # in the memory
        self._memory = torch.zeros(self._first_page + max_pages, dtype=torch.int32, device=device)
        self._counters: dict[int, torch.Tensor] = {}

    @property
    def sequences(self) -> torch.Tensor:
        """[max_sequences, FIELDS] int32."""
        return self._memory[: FIELDS * self.max_sequences].view(-1, FIELDS)

    @property
    def rows(self) -> torch.Tensor:
        """[max_sequences] int32: of the page tables, for each sequence in the order that they were given in."""
        return self._memory[FIELDS * self.max_sequences : self._first_page]

    @property
    def pages(self) -> torch.Tensor:
        """[max_pages] int32, those of one sequence after those of another."""
        return self._memory[self._first_page :]

    def bring(self, numbers: Sequence[Sequence[int]], rows: Sequence[int], pages: Sequence[np.ndarray]) -> None:
        """numbers: FIELDS of each sequence; those that lack are sequences of no tokens. pages: int64, of each."""
        num_pages = sum(map(len, pages))
        if len(numbers) > self.max_sequences or num_pages > self.max_pages:
            raise ValueError(
                f"a step of {len(numbers)} sequences and {num_pages} pages does not fit into the room for "
                f"{self.max_sequences} and {self.max_pages}"
            )
        size = self._first_page + num_pages
        # PyTorch gives pinned memory again only when the copies from it are done.
        staged = torch.zeros(size, dtype=torch.int32, pin_memory=self.device.type == "cuda")
        values = staged.numpy()
        values[: FIELDS * len(numbers)] = np.array(numbers, np.int32).ravel()
        values[FIELDS * self.max_sequences :][: len(rows)] = rows
        if pages:
            np.concatenate(pages, out=values[self._first_page :], casting="unsafe")
        self._memory[:size].copy_(staged, non_blocking=True)

    def counters(self, num_kv_heads: int) -> torch.Tensor:
        """[max_sequences * num_kv_heads] int32, zero between launches: each one that counts leaves them so."""
        found = self._counters.get(num_kv_heads)
        if found is None:
            found = torch.zeros(self.max_sequences * num_kv_heads, dtype=torch.int32, device=self.device)
            self._counters[num_kv_heads] = found
        return found


@dataclass(frozen=True)
class DevicePlan:
    """Who attends to what in a step, for the operators of GPUs.

    sequences: [S, FIELDS] int32 and pages [.] int32, on the device; sequences with one new token come first, which are
    num_decodes. num_tokens: new ones of all. most_new: most new tokens of a sequence. longest: most tokens that a
    decode attends to; None where the plan stands for any, so that launches may not depend on it.
    """

    room: PlanRoom
    sequences: torch.Tensor
    pages: torch.Tensor
    num_decodes: int
    num_tokens: int
    most_new: int
    longest: int | None
    page_size: int
    window: int | None

    @cached_property
    def decodes(self) -> torch.Tensor:
        return self.sequences[: self.num_decodes]

    @cached_property
    def chunks(self) -> torch.Tensor:
        return self.sequences[self.num_decodes :]

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """New tokens and all tokens of each sequence. Waits for the device."""
        return [(num_new, length) for _, num_new, length, _ in self.sequences.tolist()]

    def standing_for(self, num_places: int) -> DevicePlan:
        """The plan of any step of up to so many decodes, each at a place, that is brought to the room; places that lack
        are of no tokens.
        """
        if self.most_new > 1:
            raise ValueError("a plan that stands for any step of decodes was asked for a step with more new tokens")
        places = self.room.sequences[:num_places]
        return replace(self, sequences=places, num_decodes=num_places, num_tokens=num_places, longest=None)


def plan_on_device(
    page_tables: torch.Tensor,
    query_lengths: Sequence[int],
    context_lengths: Sequence[int],
    *,
    page_size: int,
    window: int | None,
    device: torch.device,
    rows: Sequence[int] | None = None,
    room: PlanRoom | None = None,
    num_places: int | None = None,
) -> DevicePlan:
    """As `plan_attention`; page_tables in main memory. room: where the plan lies, None for a new one. num_places: as
    for `DevicePlan.standing_for`, of a plan that is to be such a one.
    """
    num_sequences = len(query_lengths)
    rows = range(num_sequences) if rows is None else rows
    tables = page_tables.numpy()
    starts = list(accumulate(query_lengths, initial=0))
    order = sorted(range(num_sequences), key=lambda sequence: query_lengths[sequence] != 1)  # stable
    numbers, pages = [], []
    num_pages = num_decodes = longest = most_new = 0
    for sequence in order:
        num_new, length = query_lengths[sequence], context_lengths[sequence]
        first = 0 if window is None else max(0, length - num_new - window + 1)
        first_page, last_page = first // page_size, (length - 1) // page_size
        numbers.append((starts[sequence], num_new, length, num_pages - first_page))
        pages.append(tables[rows[sequence], first_page : last_page + 1])
        num_pages += last_page + 1 - first_page
        most_new = max(most_new, num_new)
        if num_new == 1:
            num_decodes += 1
            longest = max(longest, length - first)
    if room is None:
        room = PlanRoom(max(num_sequences, num_places or 0), num_pages, device)
    room.bring(numbers, rows, pages)
    sequences = room.sequences[:num_sequences]
    plan = DevicePlan(room, sequences, room.pages, num_decodes, starts[-1], most_new, longest, page_size, window)
    return plan if num_places is None else plan.standing_for(num_places)
