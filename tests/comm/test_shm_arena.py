"""Where rounds lie: none over another that somebody may still be reading."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phalanx.comm.shm_arena import Arena
from phalanx.comm.shm_calls import WINDOW
from phalanx.comm.shm_segment import ARENA_BYTES, BLOCK_BYTES, HEADER_BYTES, NUM_BLOCKS, ROUND_BYTES, Segment
from phalanx.native import find_native

NATIVE = find_native()
sizes = st.lists(
    st.one_of(st.integers(0, 4096), st.integers(0, ROUND_BYTES), st.sampled_from([0, 1, 64, 4032, ROUND_BYTES])),
    min_size=1,
    max_size=400,
)


@contextmanager
def segment_of_one() -> Iterator[Segment]:
    file = os.memfd_create("test")
    try:
        yield Segment(file, 1)
    finally:
        os.close(file)


def publish(segment: Segment) -> int:
    segment.words[segment.epoch(0)] += 1
    return segment.words[segment.epoch(0)]


@settings(max_examples=60, deadline=None)
@given(sizes=sizes)
def test_a_place_is_taken_again_only_when_all_have_read_what_lay_there(sizes: list[int]) -> None:
    with segment_of_one() as segment:
        arena = Arena(segment, 0)
        laid: list[tuple[int, int, int]] = []  # begin, end, epoch
        waited_for = 0
        for num_bytes in sizes * 3:
            foretold = arena.needed(num_bytes)
            place, needed = arena.take(num_bytes)
            epoch = publish(segment)
            begin, end = place, place + HEADER_BYTES + num_bytes
            assert needed == foretold
            assert needed < epoch  # or nobody would ever get there
            assert begin % HEADER_BYTES == 0
            assert begin // BLOCK_BYTES == (end - 1) // BLOCK_BYTES < NUM_BLOCKS
            under = [each for each in laid if each[0] < end and begin < each[1]]
            # Others that have published so many rounds have read all but the last WINDOW of them.
            waited_for = max(waited_for, needed)
            assert all(each[2] <= waited_for - WINDOW for each in under)
            laid = [each for each in laid if each not in under] + [(begin, end, epoch)]


def test_a_block_that_is_filled_to_its_border_is_left() -> None:
    with segment_of_one() as segment:
        arena = Arena(segment, 0)
        for number in range(3 * NUM_BLOCKS):
            first, needed = arena.take(BLOCK_BYTES - 4096 - HEADER_BYTES)
            publish(segment)
            second, none = arena.take(4096 - HEADER_BYTES)
            publish(segment)
            assert (first, second) == (number * BLOCK_BYTES % ARENA_BYTES, first + BLOCK_BYTES - 4096)
            assert none == 0
            last = 2 * (number - NUM_BLOCKS + 1)
            assert needed == (last + WINDOW if number >= NUM_BLOCKS else 0)


@pytest.mark.skipif(NATIVE.library is None, reason=f"needs the native library: {NATIVE.told}")
@settings(max_examples=30, deadline=None)
@given(sizes=sizes)
def test_the_native_library_keeps_the_same_account(sizes: list[int]) -> None:
    assert NATIVE.library is not None
    with segment_of_one() as ours, segment_of_one() as theirs:
        arena = Arena(ours, 0)
        group = NATIVE.library.Group(theirs, theirs.address, theirs.layout(), 0, [-1], True, WINDOW, torch.Tensor)
        data = torch.zeros(ROUND_BYTES, dtype=torch.uint8)
        for num_bytes in sizes * 3:
            arena.take(num_bytes)
            publish(ours)
            done = group.broadcast(data.data_ptr(), num_bytes, 0, 0, 1.0) if num_bytes else group.barrier(1.0)
            assert isinstance(done, int), done
        words = [ours.epoch(0), ours.cursor(0), *ours.ends(0)]
        assert [ours.words[word] for word in words] == [theirs.words[word] for word in words]
