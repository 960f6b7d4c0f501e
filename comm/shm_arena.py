"""Where in shared memory the rounds of collectives lie."""

from __future__ import annotations

from phalanx.comm.shm_calls import WINDOW
from phalanx.comm.shm_segment import ARENA_BYTES, BLOCK_BYTES, HEADER_BYTES, NUM_BLOCKS, Segment


class Arena:
    """One rank's account of the arenas, which all ranks fill alike: round behind round, each in one block of
    `BLOCK_BYTES`, and from the first block again after the last.

    A rank comes back to a block only when every other has published `WINDOW` rounds more than there were when the block
    was left, and therefore has read all that lies there. The account is kept in the rank's own words of shared memory,
    where the native library keeps it too; see `Group::next` in `csrc/group.cpp`.
    """

    def __init__(self, segment: Segment, rank: int) -> None:
        self._words = segment.words
        self._cursor = segment.cursor(rank)
        self._ends = segment.ends(rank)
        self._epoch = segment.epoch(rank)

    def needed(self, num_bytes: int) -> int:
        """The epoch that the others must have reached before a round of so many bytes may be put down now."""
        place = self._words[self._cursor]
        block = max(0, place - 1) // BLOCK_BYTES
        return self._needed(block + 1) if place + _taken(num_bytes) > (block + 1) * BLOCK_BYTES else 0

    def take(self, num_bytes: int) -> tuple[int, int]:
        """Where in each rank's arena the slot of the next round begins, and what `needed` says of it."""
        words, taken, needed = self._words, _taken(num_bytes), 0
        place = words[self._cursor]
        block = max(0, place - 1) // BLOCK_BYTES
        if place + taken > (block + 1) * BLOCK_BYTES:
            place = (block + 1) * BLOCK_BYTES
            needed = self._needed(block + 1)
            words[self._ends[block % NUM_BLOCKS]] = words[self._epoch]
        words[self._cursor] = place + taken
        return place % ARENA_BYTES, needed

    def _needed(self, block: int) -> int:
        end = self._words[self._ends[block % NUM_BLOCKS]]
        return end + WINDOW if end else 0


def _taken(num_bytes: int) -> int:
    return HEADER_BYTES + -(-num_bytes // HEADER_BYTES) * HEADER_BYTES
