"""Which part of a rank took how much of its GPU, and which settings would fit; without a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.made_up_memory import MIB, MadeUpMemory

from phalanx.engine.booked_graphs import BookedGraphs
from phalanx.engine.kv_budget import pages_within
from phalanx.engine.memory_book import (
    ACTIVATIONS,
    COMMUNICATORS,
    GRAPHS,
    PAGES,
    STEP_ROWS,
    WEIGHTS,
    WORKSPACES,
    MemoryBook,
    Sizes,
)
from phalanx.errors import PhalanxError

SIZES = Sizes(
    num_ranks=2,
    weight_bytes=600 * MIB,
    step_tokens=1024,
    step_rows=64,
    page_size=16,
    page_bytes=MIB,
    least_pages=100,
    share=0.5,
)


def loaded(total: int = 1000, weights: int = 600, sizes: Sizes = SIZES) -> tuple[MadeUpMemory, MemoryBook]:
    """A rank of so many MiB with its communicators, 20 MiB, and its weights; 30 MiB were taken before it came."""
    memory = MadeUpMemory(total, outside=30)
    book = MemoryBook(memory, sizes)
    memory.outside += 20
    book.book(COMMUNICATORS, COMMUNICATORS)
    memory.take(weights)
    book.book(WEIGHTS, WORKSPACES)
    return memory, book


def in_mib(book: MemoryBook) -> dict[str, int]:
    return {part: size // MIB for part, size in book.account().items()}


def test_the_parts_and_what_is_free_are_the_whole_device() -> None:
    memory, book = loaded()
    memory.outside += 7
    memory.take(100)
    book.book(PAGES, WORKSPACES)
    with book.trying(512):
        memory.use(64)
    with book.trying(4, STEP_ROWS):
        memory.use(10)
    assert in_mib(book) == {
        "in use before": 30,
        "weights": 600,
        "KV pages": 100,
        "activations": 64,
        "graphs": 0,
        "communicators": 20,
        "workspaces": 7,
        "free": 179,
    }
    assert book.room_bytes() == 179 * MIB
    memory.drop(100)
    book.book(PAGES, WORKSPACES)
    assert in_mib(book)["KV pages"] == 0
    assert book.room_bytes(0.5) == (1000 - 657) * MIB // 2 - 64 * MIB


class Captured:
    """`Graphs` whose captures take 3 MiB of the driver's memory, and at first 5 MiB for tensors."""

    def __init__(self, memory: MadeUpMemory) -> None:
        self.memory = memory
        self.num = 0

    def capture(self, run: Callable[[], None]) -> Any:
        run()
        self.memory.outside += 3
        self.memory.cached += 0 if self.num else 5
        self.num += 1
        return self

    def reset(self) -> None:
        self.memory.outside -= 3 * self.num
        self.num = 0


def test_graphs_have_room_kept_by_the_first_and_then_count_as_they_are() -> None:
    memory, book = loaded()
    graphs = BookedGraphs(Captured(memory), book)
    with book.trying(64):
        memory.use(16)
    graphs.capture(lambda: None)
    book.reserve_graphs(kept_bytes=8 * MIB, num_graphs=10, most_places=32)
    assert in_mib(book)["graphs"] == 8 + 10 * 3 + 8 + 4  # kept, of the driver, by the step's tokens, logits
    graphs.capture(lambda: None)  # the same step once more, as where it has transfers
    book.reserve_graphs(kept_bytes=8 * MIB, num_graphs=10, most_places=32)
    assert in_mib(book)["graphs"] == 8 + 10 * 2 * 3 + 8 + 4
    graphs.reset()
    book.book(WORKSPACES, WORKSPACES)
    assert in_mib(book)["workspaces"] == 0
    memory.give_back()
    for _ in range(40):
        graphs.capture(lambda: None)
    assert in_mib(book)["graphs"] == 5 + 40 * 3
    book.book(WORKSPACES, WORKSPACES)
    assert in_mib(book)["workspaces"] == 0


def error_of(book: MemoryBook, what: str, part: str, fail: Callable[[], object]) -> str:
    with pytest.raises(PhalanxError) as caught, book.during(what, part):
        fail()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    return str(caught.value)


def test_weights_that_do_not_fit_say_how_many_ranks_would_hold_them() -> None:
    memory, book = loaded(total=400, weights=0)
    memory.take(200)
    text = error_of(book, "the loading of weights", WEIGHTS, lambda: memory.take(200))
    assert text.startswith("out of GPU memory in the loading of weights, which asked for 200 MiB more. Of 400 MiB:")
    assert re.search(r"weights +200 MiB\n", text)
    # 350 MiB are there for weights, of 2 x 600 MiB in all; a tenth is left for what else there is.
    assert text.endswith("what would fit: 4 ranks in place of 2 for these layers (parallel.tensor, or more stages)")
    assert 2 * 600 / 4 <= 350 * 0.9 < 2 * 600 / 3


def test_a_step_that_does_not_fit_says_how_many_tokens_would() -> None:
    memory, book = loaded()
    with book.trying(128):
        memory.use(64)
    text = error_of(book, "a first step", ACTIVATIONS, lambda: memory.use(512))
    found = re.search(r"what would fit: engine\.max_batch_tokens: (\d+); or", text)
    assert found is not None
    tokens = int(found[1])
    memory.use(tokens // 2)  # which is what they take, at half a MiB each
    assert tokens * 0.5 > 0.8 * 350


def test_a_step_that_draws_too_much_says_how_many_sequences_may() -> None:
    memory, book = loaded()
    with book.trying(1024):
        memory.use(64)
    with book.trying(8, STEP_ROWS):
        memory.use(80)
    fitting = r"what would fit: engine\.max_sequences: 31; or"  # 10 MiB each of 315
    with pytest.raises(PhalanxError, match=fitting), book.during("a first step", ACTIVATIONS, STEP_ROWS):
        memory.use(640)


def test_pages_of_a_stated_size_that_do_not_fit_say_below_which_size() -> None:
    memory, book = loaded(sizes=SIZES._replace(share=None))
    text = error_of(book, "the making of pages", PAGES, lambda: memory.take(900))
    assert "what would fit: engine.kv_cache below 315MiB, by what steps take; or" in text


def test_a_capture_that_does_not_fit_says_what_goes_without() -> None:
    memory, book = loaded()
    graphs = BookedGraphs(Captured(memory), book)
    with pytest.raises(PhalanxError, match=r"in the capture of a graph.*(\n.*)*engine\.cuda_graphs: false"):
        graphs.capture(lambda: memory.take(500))


def test_too_few_pages_say_which_settings_would_give_enough() -> None:
    """Each of them by itself."""
    memory, book = loaded(total=800)
    with book.trying(1024):
        memory.use(64)
    room_bytes = book.room_bytes()
    assert room_bytes == 86 * MIB
    fitting = dict(each.split(": ") for each in book.too_few_pages(room_bytes)[:-1])
    assert fitting == {"model.max_length": "688"}  # no work could be spared, and no share would do
    assert pages_within(room_bytes, 0.5, MIB) * 16 == 688

    memory, book = loaded(total=880)
    with book.trying(1024):
        memory.use(64)
    room_bytes = book.room_bytes()
    assert pages_within(room_bytes, 0.5, MIB) < 100
    fitting = dict(each.split(": ") for each in book.too_few_pages(room_bytes)[:-1])
    assert pages_within(room_bytes, float(fitting["engine.kv_cache_share"]), MIB) >= 100
    spared = 64 * MIB * (1024 - int(fitting["engine.max_batch_tokens"])) // 1024
    assert pages_within(room_bytes + spared, 0.5, MIB) >= 100


def test_pages_in_8_bits_are_proposed_with_what_they_take_where_they_would_fit() -> None:
    narrow = SIZES._replace(narrow_page_bytes=MIB * 33 // 64)
    _, book = loaded(total=760, sizes=narrow)
    assert book.room_bytes() == 110 * MIB
    fitting = book.too_few_pages(110 * MIB)
    assert "engine.kv_cache_dtype: int8, whose pages take 103 MiB in place of 200 MiB" in fitting
    assert not [each for each in book.too_few_pages(100 * MIB) if "int8" in each]

    memory, book = loaded(total=1000, sizes=narrow._replace(share=None))
    memory.take(300)
    book.book(PAGES, WORKSPACES)
    text = error_of(book, "a first step", ACTIVATIONS, lambda: memory.use(100))
    assert "or engine.kv_cache_dtype: int8 and engine.kv_cache: 155MiB, for as many tokens; or" in text


def test_where_no_parts_are_told_there_is_no_account() -> None:
    memory = MadeUpMemory(100)
    memory.by_part = False
    book = MemoryBook(memory, SIZES)
    book.book(WEIGHTS, WORKSPACES)
    with book.trying(4), book.capturing():
        memory.use(4)
    assert book.account() == {}
    assert book.room_bytes() == 100 * MIB
    assert GRAPHS not in book.parts
