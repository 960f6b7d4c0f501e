// Waiting for words of shared memory: spinning, giving the core away, asleep; and noticing who will never come.
#pragma once
#include <cstdint>
#include <vector>

#include "segment.hpp"

namespace phalanx {

enum class End : int { kDone, kLate, kAborted, kLeft, kEnded, kUnlike, kInterrupted };

// How a transfer ended. rank: who aborted, went, or made another call. header, expected: of that call and this rank's.
struct Outcome {
  End end = End::kDone;
  int rank = -1;
  int64_t header = 0, expected = 0;

  explicit operator bool() const { return end == End::kDone; }
};

// The clock starts with the first wait that takes long: what came before was no waiting to speak of.
struct Deadline {
  double timeout_s;
  int64_t at_ns = 0;
};

// Whether a signal (an interrupt from the keyboard) calls for the end of a wait; called with no lock held.
using Interrupted = bool (*)();

// `until` is for one thread at a time.
class Waiter {
 public:
  // pidfds: by rank; they stay the caller's. may_spin: a core is there for every rank.
  Waiter(const Segment& segment, int rank, std::vector<int> pidfds, bool may_spin, Interrupted interrupted);

  // Waits until `word`, which `rank` raises, is at `target` or past it.
  Outcome until(const Word& word, int rank, int64_t target, Deadline& deadline) {
    if (word.load(std::memory_order_acquire) >= target) return {};
    return wait(word, rank, target, deadline);
  }
  // Raises a word of this rank's own that others may wait for.
  void raise_for(int rank, Word& word, int64_t value);
  void raise_for_all(Word& word, int64_t value);

 private:
  Outcome wait(const Word& word, int rank, int64_t target, Deadline& deadline);
  Outcome sleep(const Word& word, int rank, int64_t target, Deadline& deadline);
  Outcome check(const Word& word, int rank, int64_t target) const;
  void ring_if_awaiting(int rank);

  const Segment& segment_;
  const int rank_;
  const std::vector<int> pidfds_;
  const int most_spins_;
  int num_spins_;
  const Interrupted interrupted_;
};

}  // namespace phalanx
