"""What took the memory of a rank's device, part by part; and, where it does not suffice, which settings would.

All of it follows from readings (`device_memory.Reading`) and the rank's sizes, so it needs no GPU to be tested.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from phalanx.engine.device_memory import MemoryMeter
from phalanx.errors import PhalanxError

if TYPE_CHECKING:
    import torch

BEFORE, WEIGHTS, PAGES, ACTIVATIONS, GRAPHS, COMMUNICATORS, WORKSPACES = PARTS = (
    "in use before",
    "weights",
    "KV pages",
    "activations",
    "graphs",
    "communicators",
    "workspaces",
)
"""In the order that they are shown in. `in use before`: the process's context, and other processes. `activations`: the
peak of the largest steps. `graphs`: what is kept for them, by estimate until they are captured. `workspaces`: kernels
that were loaded and what libraries took for themselves. Of a GPU that ranks share, what the others take meanwhile
counts too."""
FREE = "free"

ROOM = 0.9  # of what is free, that a setting proposed by proportion may fill: fragments are lost
STEP_TOKENS, STEP_ROWS = "engine.max_batch_tokens", "engine.max_sequences"
"""What bounds the two kinds of large steps: many tokens, and many tokens drawn."""
NARROW = "engine.kv_cache_dtype: int8"
ROUNDING = {STEP_TOKENS: 16, STEP_ROWS: 1}  # what is proposed is a multiple of these


class Sizes(NamedTuple):
    """Of a rank. num_ranks: of its stage. weight_bytes: that it is to hold. step_tokens: most of one sequence in a
    step. step_rows: most sequences that draw in one. page_bytes, narrow_page_bytes: of a page, and of one in 8 bits
    where it is not yet, else 0. least_pages: how many it cannot do without. share: that the pages may take of what is
    free, None where their number is stated.
    """

    num_ranks: int
    weight_bytes: int
    step_tokens: int
    step_rows: int
    page_size: int
    page_bytes: int
    least_pages: int
    share: float | None
    narrow_page_bytes: int = 0


class MemoryBook:
    """Of one rank, from before it takes anything. parts: bytes by part; none where the device does not tell them."""

    def __init__(self, meter: MemoryMeter, sizes: Sizes) -> None:
        self.by_part = meter.by_part
        self._meter = meter
        self._sizes = sizes
        self._most = {STEP_TOKENS: sizes.step_tokens, STEP_ROWS: sizes.step_rows}
        self._each_bytes: dict[str, float] = {}  # of activations: of a token, a row, by the largest step that went well
        self._shared_out = False  # whether the pages are as many as there was room for
        self._captured: list[tuple[int, int]] = []  # of each graph: bytes in all, and of them the driver's
        self.parts: dict[str, int] = {}
        if self.by_part:
            self._last = meter.read()
            self.parts = {**dict.fromkeys(PARTS, 0), BEFORE: self._last.outside_bytes}

    def book(self, inside: str, outside: str) -> None:
        """What was taken since the last call, or given back: in tensors goes under one part, beside under the other."""
        if self.by_part:
            now = self._meter.read()
            self.parts[inside] += now.allocated_bytes - self._last.allocated_bytes
            self.parts[outside] += now.outside_bytes - self._last.outside_bytes
            self._last = now

    @contextmanager
    def trying(self, number: int, setting: str = STEP_TOKENS) -> Iterator[None]:
        """A step of so many of what `setting` bounds, the most or on the way to it: what it takes at its peak."""
        if not self.by_part:
            yield
            return
        held_bytes = self._meter.read().allocated_bytes
        self._meter.reset_peak()
        yield
        peak_bytes = self._meter.read().peak_bytes - held_bytes
        self.parts[ACTIVATIONS] = max(self.parts[ACTIVATIONS], peak_bytes)
        self._each_bytes[setting] = peak_bytes / number

    def held_bytes(self) -> int:
        """In tensors now; 0 where that is not told."""
        return self._meter.read().allocated_bytes if self.by_part else 0

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """The capture of a graph, with all that it takes for good."""
        if not self.by_part:
            yield
            return
        self._meter.give_back()
        before = self._meter.read()
        with self.during("the capture of a graph", GRAPHS):
            yield
        after = self._meter.read()
        outside_bytes = after.outside_bytes - before.outside_bytes
        self._captured.append((before.free_bytes - after.free_bytes, outside_bytes))
        self.parts[GRAPHS] = max(self.parts[GRAPHS], sum(taken_bytes for taken_bytes, _ in self._captured))
        self._last = self._last._replace(free_bytes=self._last.free_bytes - outside_bytes)

    def forget_graphs(self) -> None:
        """All that were captured are gone."""
        if self._captured:
            outside_bytes = sum(outside_bytes for _, outside_bytes in self._captured)
            self._last = self._last._replace(free_bytes=self._last.free_bytes + outside_bytes)
        self._captured.clear()

    def reserve_graphs(self, kept_bytes: int, num_graphs: int, most_places: int) -> None:
        """Keeps room for steps that will be captured, by the one that has been, the smallest, in one graph or in two.
        num_graphs: steps. kept_bytes: of tensors that they read and write. most_places: of the largest.

        Each takes as much of the driver's memory as the first. They share their tensors' memory: as much as the largest
        needs by proportion, with its logits in the model's dtype, which are kept in float32.
        """
        if self._captured:
            taken_bytes, outside_bytes = map(sum, zip(*self._captured, strict=True))
            shared_bytes = max(taken_bytes - outside_bytes, math.ceil(self._each_bytes[STEP_TOKENS] * most_places))
            self.parts[GRAPHS] = kept_bytes + num_graphs * outside_bytes + shared_bytes + kept_bytes // 2

    def give_back(self) -> None:
        """What is held without need goes back to the device, once that has done what it was given."""
        self._meter.give_back()

    def room_bytes(self, part: float = 1.0) -> int:
        """For pages: `part` of what is unused now, less what steps and graphs will need of it."""
        self._shared_out = True
        needed = self.parts.get(ACTIVATIONS, 0) + self.parts.get(GRAPHS, 0)
        return int(self._meter.read().unused_bytes * part) - needed

    def account(self) -> dict[str, int]:
        """All parts, and what is left; together the whole device. Empty where it does not tell parts."""
        if not self.by_part:
            return {}
        return {**self.parts, FREE: self._last.total_bytes - sum(self.parts.values())}

    @contextmanager
    def during(self, what: str, part: str, setting: str = STEP_TOKENS) -> Iterator[None]:
        """Makes an error that says what took how much, and what would fit, of memory that runs out in `what`, where it
        was wanted for `part`. setting: that bounds it, of a step.
        """
        try:
            yield
        except RuntimeError as error:
            import torch  # which whoever got here has

            if not isinstance(error, torch.OutOfMemoryError):
                raise
            raise self._shortage(what, part, setting, error) from error

    def _shortage(self, what: str, part: str, setting: str, error: torch.OutOfMemoryError) -> PhalanxError:
        """To be made while what failed still holds its own."""
        if not self.by_part:
            return PhalanxError(f"out of memory in {what}: {error}")
        known_bytes = self.parts[part]
        self.book(part, WORKSPACES)
        if part == ACTIVATIONS:  # a peak, not a sum
            self.parts[part] = max(known_bytes, self.parts[part] - known_bytes)
        asked_bytes = _asked_bytes(error)
        asked = "" if asked_bytes is None else f", which asked for {mib(asked_bytes)} more"
        lines = [f"out of GPU memory in {what}{asked}. Of {mib(self._last.total_bytes)}:"]
        lines += [f"  {name:<13} {mib(size):>12}" for name, size in self.account().items()]
        return PhalanxError("\n".join([*lines, f"what would fit: {'; or '.join(self._fitting(part, setting))}"]))

    def _fitting(self, part: str, setting: str) -> list[str]:
        """Settings under which what was wanted for `part` would have had room, by what was measured so far."""
        sizes, weight_bytes = self._sizes, self.parts[WEIGHTS]
        room_bytes = max(0, self.account()[FREE] + self.parts[part])
        if part == WEIGHTS:
            return [self._more_ranks(sizes.weight_bytes, int(room_bytes * ROOM))]
        found, left_bytes = [], 0  # for weights; 0 where nothing says how much it must be
        each_bytes = self._each_bytes.get(setting, 0.0)
        if part == ACTIVATIONS and each_bytes:
            found += self._bounded(setting, room_bytes * ROOM / each_bytes)
            left_bytes = weight_bytes + room_bytes - int(each_bytes * self._most[setting] / ROOM)
        if part == GRAPHS:
            found.append("engine.cuda_graphs: false")
        if sizes.share is not None:
            if self._shared_out:
                found.append(f"engine.kv_cache_share below {sizes.share:g}")
        elif part == PAGES:
            found.append(f"engine.kv_cache below {mib(int(room_bytes * ROOM), '')}, by what steps take")
        else:
            held_bytes = self.parts[PAGES]
            found.append(f"engine.kv_cache below {mib(held_bytes, '')}")
            if sizes.narrow_page_bytes:
                narrow_bytes = held_bytes // sizes.page_bytes * sizes.narrow_page_bytes
                found.append(f"{NARROW} and engine.kv_cache: {mib(narrow_bytes, '')}, for as many tokens")
        return [*found, self._more_ranks(weight_bytes, left_bytes)]

    def too_few_pages(self, room_bytes: int) -> list[str]:
        """Settings under which the pages that a rank cannot do without have room; it has room_bytes for them now."""
        sizes = self._sizes
        share = 1.0 if sizes.share is None else sizes.share
        needed_bytes = math.ceil(sizes.least_pages * sizes.page_bytes / share)
        short_bytes = needed_bytes - room_bytes
        found = []
        tokens = int(max(0, room_bytes) * share) // sizes.page_bytes * sizes.page_size
        if tokens:
            found.append(f"model.max_length: {tokens}")
        narrow_bytes = math.ceil(sizes.least_pages * sizes.narrow_page_bytes / share)
        if 0 < narrow_bytes <= room_bytes:
            found.append(f"{NARROW}, whose pages take {mib(narrow_bytes)} in place of {mib(needed_bytes)}")
        spared_bytes = self.parts.get(ACTIVATIONS, 0) - short_bytes  # what the largest steps may still take
        bounds: list[str] = []
        for setting, each_bytes in self._each_bytes.items():
            if spared_bytes > 0 and each_bytes * self._most[setting] > spared_bytes:
                bounds += self._bounded(setting, spared_bytes / each_bytes)
        if bounds:
            found.append(" and ".join(bounds))  # each kind of step must take less
        wanted_share = math.ceil(100 * sizes.least_pages * sizes.page_bytes / room_bytes) / 100 if room_bytes > 0 else 2
        if share < wanted_share < 1:
            found.append(f"engine.kv_cache_share: {wanted_share:g}")
        if self.parts.get(GRAPHS, 0) >= short_bytes:
            found.append("engine.cuda_graphs: false")
        found.append(self._more_ranks(sizes.weight_bytes + needed_bytes, sizes.weight_bytes + room_bytes))
        return found

    def _bounded(self, setting: str, number: float) -> list[str]:
        """Such a bound of steps, if it is one."""
        fitting = int(number) // ROUNDING[setting] * ROUNDING[setting]
        return [f"{setting}: {fitting}"] if 0 < fitting < self._most[setting] else []

    def _more_ranks(self, wanted_bytes: int, room_bytes: int) -> str:
        """That hold no more than room_bytes each of what one of them would hold now. room_bytes: 0 for not known."""
        num_ranks = self._sizes.num_ranks
        if room_bytes <= 0:
            return f"more ranks than {num_ranks} for these layers (parallel.tensor, or more stages)"
        fitting = max(num_ranks + 1, math.ceil(num_ranks * wanted_bytes / room_bytes))
        return f"{fitting} ranks in place of {num_ranks} for these layers (parallel.tensor, or more stages)"


def mib(num_bytes: int, space: str = " ") -> str:
    return f"{num_bytes / 2**20:.0f}{space}MiB"


_ASKED = re.compile(r"Tried to allocate ([\d.]+) (bytes|[KMG]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def _asked_bytes(error: torch.OutOfMemoryError) -> int | None:
    """As PyTorch's allocator says it."""
    match = _ASKED.search(str(error))
    return None if match is None else int(float(match[1]) * _UNITS[match[2]])
