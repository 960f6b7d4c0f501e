// The memory that the ranks of a group share, as `shm_segment.py` lays it out and says in numbers.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace phalanx {

// Numbers of words are of 64 bits, all else is in bytes.
struct Layout {
  int size = 0;  // ranks
  size_t rank_words = 0, rank_stride = 0;
  size_t epoch = 0, left = 0, awaited = 0, bell = 0, cursor = 0, ends = 0;  // within a rank's words
  size_t aborted = 0;                                                   // word of the group
  size_t pair_words = 0, pair_stride = 0, consumed = 0;
  size_t arena_at = 0, block_bytes = 0, num_blocks = 0;
  size_t round_bytes = 0, small_bytes = 0;  // most that a round holds; most that is summed by every rank for itself
  size_t ring_at = 0, ring_bytes = 0, ring_stride = 0, num_ring = 0;
  size_t header_bytes = 0;
};

using Word = std::atomic<int64_t>;
static_assert(sizeof(Word) == 8 && Word::is_always_lock_free, "words are shared with processes that know no atomics");

// A slot: what lies there, and the data.
struct Slot {
  int64_t* header;
  char* data;
};

class Segment {
 public:
  Segment(uintptr_t address, const Layout& layout) : base_(reinterpret_cast<char*>(address)), at(layout) {}

  Word& word(size_t number) const { return reinterpret_cast<Word*>(base_)[number]; }
  Word& of_rank(int rank, size_t word_of_rank) const {
    return word(at.rank_words + size_t(rank) * at.rank_stride + word_of_rank);
  }
  Word& produced(int source, int to) const { return word(at.pair_words + pair(source, to) * at.pair_stride); }
  Word& consumed(int source, int to) const {
    return word(at.pair_words + pair(source, to) * at.pair_stride + at.consumed);
  }
  Slot in_arena(int rank, size_t place) const {
    const size_t arena = at.block_bytes * at.num_blocks;
    return slot(at.arena_at + size_t(rank) * arena + place % arena);
  }
  Slot ring(int source, int to, size_t number) const {
    return slot(at.ring_at + (pair(source, to) * at.num_ring + number) * at.ring_stride);
  }

 private:
  char* base_;

  size_t pair(int source, int to) const { return size_t(source) * size_t(at.size) + size_t(to); }
  Slot slot(size_t offset) const {
    return {reinterpret_cast<int64_t*>(base_ + offset), base_ + offset + at.header_bytes};
  }

 public:
  const Layout at;
};

}  // namespace phalanx
