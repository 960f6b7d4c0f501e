// One rank's end of a group, its calls blocking: the protocol of `shm.py`, whose ranks it can be mixed with.
#pragma once
#include <vector>

#include "reduce.hpp"
#include "waiter.hpp"

namespace phalanx {

// What a call is in a signature.
enum Op : int { kAllReduce = 1, kAllGather, kReduceScatter, kBroadcast, kBarrier, kSend };

// What the ranks must agree about; every round carries it.
inline int64_t signature(Op op, size_t num_bytes, int dtype, int root = 0) {
  return ((int64_t(num_bytes) << 16 | root) << 3 | dtype) << 3 | op;
}

// For one thread at a time.
class Group {
 public:
  Group(uintptr_t address, const Layout& layout, int rank, std::vector<int> pidfds, bool may_spin, int64_t window,
        Interrupted interrupted);

  // Whether a rank has ended the group; to be asked before a call.
  Outcome aborted() const;

  // Who arrived last in the collective since `forget_last`, as far as this rank saw; -1 where that does not show.
  int last() const { return last_; }
  void forget_last() { last_ = -1; }

  Outcome all_reduce(char* x, size_t num_bytes, int dtype, bool max, double timeout_s);
  // x: replaced by the sum's norm. sum: receives the sum and the residual. See AddRmsNorm.
  Outcome all_reduce_rms_norm(char* x, char* sum, const char* residual, const char* weight, float eps, size_t num_rows,
                              size_t width, int dtype, double timeout_s);
  // counts: bytes of each rank.
  Outcome all_gather(char* output, const char* x, const std::vector<size_t>& counts, int dtype, double timeout_s);
  // counts: elements that each rank receives.
  Outcome reduce_scatter(char* output, const char* x, const std::vector<size_t>& counts, int dtype, double timeout_s);
  Outcome broadcast(char* x, size_t num_bytes, int dtype, int root, double timeout_s);
  Outcome barrier(double timeout_s);
  Outcome send(const char* x, size_t num_bytes, int dtype, int to, double timeout_s);
  Outcome recv(char* x, size_t num_bytes, int dtype, int source, double timeout_s);

 private:
  using Slots = std::vector<Slot>;

  int64_t epoch() const { return epoch_.load(std::memory_order_relaxed); }
  Outcome until_all(int64_t target, Deadline& deadline);
  // Takes every rank's slot of the next round, of so many bytes of data, and waits until this rank may write to its own.
  Outcome next(size_t num_bytes, Deadline& deadline);
  void publish(int64_t call);
  // Publishes, waits for the others and compares what they called.
  Outcome meet(int64_t call, Deadline& deadline);
  Outcome confirm(int rank, int64_t call) const;
  // In one round each rank reads all that the others hold; in two each sums a share, and reads those of the others.
  Outcome reduce_whole(char* x, size_t count, int dtype, Combine combine, int64_t call, Deadline& deadline);
  Outcome reduce_shared(char* x, size_t count, int dtype, Combine combine, int64_t call, Deadline& deadline);

  const Segment segment_;
  Waiter waiter_;
  const int rank_, size_;
  const int64_t window_;
  int last_ = -1;
  Word &epoch_, &cursor_;
  Slots slots_;                      // of the round under way, by rank
  std::vector<const void*> inputs_;  // the same, of a sum
};

}  // namespace phalanx
