"""The memory that the ranks of a `shm` group share: its layout, and how they all come to hold it."""

from __future__ import annotations

import json
import mmap
import os
import secrets
from typing import NamedTuple

import torch
from torch._C._distributed_c10d import Store

from phalanx.comm.communicator import DTYPES
from phalanx.comm.group import GroupSpec
from phalanx.errors import CommError

ROUND_BYTES = 512 * 1024  # most that a rank puts down in a round of a collective
SMALL_BYTES = 64 * 1024  # up to this every rank sums for itself, above it pays to share the sums out
RING_BYTES = 256 * 1024
# A rank writes all over its arena before it comes back to a place. By then the lines there have left the second-level
# caches of those who read them, from where fetching them back is slow: 2 Zen 4 cores (1 MiB each) exchange 128 KB in
# 9.7 us by arenas of 2 to 4 MiB, in 13 us by 1 MiB, in 24 us by two alternating slots, and in 17 us past the caches.
NUM_BLOCKS, NUM_RING = 8, 8

_WORD_BYTES = 8
HEADER_BYTES = _LINE_BYTES = 64  # what two ranks write must not lie on one cache line
_PAGE_BYTES = 4096

# Words of the segment's first line, then of the lines of a rank.
_TOKEN, ABORTED = 0, 1
_EPOCH, _LEFT, _PID, _AWAITED, _BELL, _CURSOR, _ENDS = 0, 8, 9, 16, 24, 32, 40
_RANK_WORDS = _ENDS + NUM_BLOCKS + -NUM_BLOCKS % 8
_PAIR_WORDS = 16


class Slots(NamedTuple):
    """The slots of an ordered pair of ranks. headers: words that say what lies there. data: byte offsets."""

    headers: tuple[int, ...]
    data: tuple[int, ...]


class Segment:
    """One mapping of the shared memory of `size` ranks.

    words: all of it as 64-bit integers. typed: all of it as a tensor of each dtype. Written on x86-64 only, where other
    cores see the stores of one core in their order, so that a counter is raised after the data it announces.
    Pages cost memory once they are written to: what a group never uses costs nothing.
    """

    def __init__(self, file: int, size: int) -> None:
        self.size = size
        pairs_at = _LINE_BYTES + size * _RANK_WORDS * _WORD_BYTES
        self._pairs_word = pairs_at // _WORD_BYTES
        self._arena_at = _pages(pairs_at + size * size * _PAIR_WORDS * _WORD_BYTES)
        self._ring_at = self._arena_at + size * ARENA_BYTES
        self.num_bytes = self._ring_at + size * size * NUM_RING * _stride(RING_BYTES)
        if os.fstat(file).st_size == 0:
            os.ftruncate(file, self.num_bytes)
        elif os.fstat(file).st_size != self.num_bytes:
            raise OSError(f"it holds {os.fstat(file).st_size:,} bytes, not {self.num_bytes:,}")
        memory = mmap.mmap(file, self.num_bytes)
        self.words = memoryview(memory).cast("q")
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        self.address = whole.data_ptr()
        self.typed = {dtype: whole.view(dtype) for dtype in DTYPES}

    # ---- words of a rank ----

    def epoch(self, rank: int) -> int:
        """Rounds of collectives that the rank has published."""
        return self._word(rank, _EPOCH)

    def cursor(self, rank: int) -> int:
        """Where in the arenas the next round begins: the rank's own note, which it shares with the native library."""
        return self._word(rank, _CURSOR)

    def ends(self, rank: int) -> list[int]:
        """Of each block of the arena, the epoch of the last round there: notes of the rank, too."""
        return [self._word(rank, _ENDS + block) for block in range(NUM_BLOCKS)]

    def left(self, rank: int) -> int:
        """1 once the rank has closed its end."""
        return self._word(rank, _LEFT)

    def pid(self, rank: int) -> int:
        return self._word(rank, _PID)

    def awaited(self, rank: int) -> int:
        """While the rank sleeps: the number of the one it waits for, plus 1; else 0."""
        return self._word(rank, _AWAITED)

    def bell(self, rank: int) -> int:
        """What the rank sleeps on: whoever changes it wakes the rank."""
        return self._word(rank, _BELL)

    # ---- words of an ordered pair ----

    def produced(self, source: int, to: int) -> int:
        """Slots that `source` has filled for `to`."""
        return self._pairs_word + (source * self.size + to) * _PAIR_WORDS

    def consumed(self, source: int, to: int) -> int:
        """Slots of these that `to` has emptied."""
        return self.produced(source, to) + _PAIR_WORDS // 2

    # ---- slots ----

    def arena(self, rank: int) -> int:
        """Byte offset of a rank's arena. A slot there is its header, a word in a line of its own, and the data."""
        return self._arena_at + rank * ARENA_BYTES

    def ring(self, source: int, to: int) -> Slots:
        """All slots from `source` to `to`, in the order they are used."""
        first = self._ring_at + (source * self.size + to) * NUM_RING * _stride(RING_BYTES)
        starts = [first + number * _stride(RING_BYTES) for number in range(NUM_RING)]
        return Slots(tuple(start // _WORD_BYTES for start in starts), tuple(start + HEADER_BYTES for start in starts))

    def layout(self) -> dict[str, int]:
        """All of this in numbers, for the native library; see `Layout` in `csrc/segment.hpp`."""
        return {
            "size": self.size,
            "rank_words": _LINE_BYTES // _WORD_BYTES,
            "rank_stride": _RANK_WORDS,
            "epoch": _EPOCH,
            "left": _LEFT,
            "awaited": _AWAITED,
            "bell": _BELL,
            "cursor": _CURSOR,
            "ends": _ENDS,
            "aborted": ABORTED,
            "pair_words": self._pairs_word,
            "pair_stride": _PAIR_WORDS,
            "consumed": _PAIR_WORDS // 2,
            "arena_at": self._arena_at,
            "block_bytes": BLOCK_BYTES,
            "num_blocks": NUM_BLOCKS,
            "round_bytes": ROUND_BYTES,
            "small_bytes": SMALL_BYTES,
            "ring_at": self._ring_at,
            "ring_bytes": RING_BYTES,
            "ring_stride": _stride(RING_BYTES),
            "num_ring": NUM_RING,
            "header_bytes": _LINE_BYTES,
        }

    def _word(self, rank: int, word: int) -> int:
        return _LINE_BYTES // _WORD_BYTES + rank * _RANK_WORDS + word


def share_segment(spec: GroupSpec, store: Store) -> Segment:
    """The segment of a group, once every rank holds it. Called by all ranks, which have met on `store`.

    It is a memory file of rank 0 that never has a name, so it ends with the last process that maps it, however that
    ends, and the size of /dev/shm (64 MB in many containers) does not limit it. Raises CommError on every rank where
    one cannot map it.
    """
    file: int | None = None
    segment: Segment | None = None
    problem = ""
    try:
        if spec.rank == 0:
            offer = {}
            try:
                file = os.memfd_create(f"phalanx-{spec.name}"[:200])
                segment = Segment(file, spec.size)
                segment.words[_TOKEN] = token = secrets.randbits(62)
                offer = {"path": f"/proc/{os.getpid()}/fd/{file}", "token": token}
            except (OSError, ValueError) as error:
                problem = _reason(error)
            store.set("segment", json.dumps(offer))
        else:
            offer = json.loads(store.get("segment"))
            if offer:
                try:
                    file = os.open(offer["path"], os.O_RDWR | os.O_CLOEXEC)
                    segment = Segment(file, spec.size)
                    if segment.words[_TOKEN] != offer["token"]:
                        problem = f"{offer['path']} is not the file that rank 0 made"
                except (OSError, ValueError) as error:
                    problem = _reason(error)
        if segment is not None:
            segment.words[segment.pid(spec.rank)] = os.getpid()
        store.set(f"mapped/{spec.rank}", problem)
        problems = [f"rank {rank}: {text}" for rank in range(spec.size) if (text := _told(store, rank))]
        if problems or segment is None:
            raise CommError(
                f"the ranks of group {spec.name!r} cannot share memory: {'; '.join(problems)}. "
                "Use the backend gloo (comm.backend: gloo), or mend what stands in the way"
            )
        return segment
    finally:
        if file is not None:
            os.close(file)


def _told(store: Store, rank: int) -> str:
    return store.get(f"mapped/{rank}").decode()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _stride(num_bytes: int) -> int:
    """Of a slot of `num_bytes`: its header's line and its data, up to whole pages."""
    return _pages(_LINE_BYTES + num_bytes)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES


BLOCK_BYTES = _stride(ROUND_BYTES)
ARENA_BYTES = NUM_BLOCKS * BLOCK_BYTES
