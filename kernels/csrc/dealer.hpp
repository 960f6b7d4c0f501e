// Who multiplies by which block of a weight, over the threads of the pool.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "pool.hpp"

namespace phalanx {

// Rows at a time: weights are read from memory once for so many, and these rows of x stay in the last cache.
constexpr size_t kMostRowsAtOnce = 384;
constexpr size_t kAheadBytes = 4096;  // that memory needs to answer in time
constexpr size_t kNearBytes = 1024;   // and the second cache
constexpr size_t kPackedAlone = 16384;  // inputs that one thread packs before another would be there

inline size_t share(size_t total, size_t part, size_t num_parts) { return total * part / num_parts; }
inline size_t divide_up(size_t total, size_t by) { return (total + by - 1) / by; }

/// Blocks dealt out so that each thread reads a stream of its own, and who is done early takes from the others' ends.
class Dealer {
 public:
  Dealer(size_t blocks, size_t threads) : ranges_(threads) {
    for (size_t i = 0; i < threads; i++) {
      ranges_[i].left.store(pack(share(blocks, i, threads), share(blocks, i + 1, threads)), std::memory_order_relaxed);
    }
  }

  // The next block of a thread, or of another one; false where none is left.
  bool take(size_t thread, size_t& block) {
    if (take_from(ranges_[thread], block, true)) return true;
    for (size_t i = 1; i < ranges_.size(); i++) {
      if (take_from(ranges_[(thread + i) % ranges_.size()], block, false)) return true;
    }
    return false;
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};  // first and end
  };
  std::vector<Range> ranges_;

  static uint64_t pack(size_t first, size_t end) { return uint64_t(first) << 32 | end; }

  static bool take_from(Range& range, size_t& block, bool front) {
    uint64_t left = range.left.load(std::memory_order_relaxed);
    for (;;) {
      const size_t first = left >> 32, end = uint32_t(left);
      if (first == end) return false;
      const uint64_t rest = front ? pack(first + 1, end) : pack(first, end - 1);
      if (range.left.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
        block = front ? first : end - 1;
        return true;
      }
    }
  }
};

/// multiply(block, first group of rows, end group, whether the next block comes after it), for all blocks and groups.
template <class F>
void deal_blocks(size_t blocks, size_t groups, F&& multiply) {
  constexpr size_t kComputeTasks = 16;  // of a thread, so that one who comes late leaves work to the others
  constexpr size_t kStreamGroups = 4;   // of rows, at most, where the weights' way from memory still tells
  const size_t threads = size_t(Pool::instance().size());
  if (groups <= kStreamGroups) {
    Dealer dealer(blocks, threads);
    parallel_for(int(threads), [&](int thread) {
      for (size_t block; dealer.take(size_t(thread), block);) multiply(block, size_t(0), groups, block + 1 < blocks);
    });
    return;
  }
  const size_t most_tasks = kComputeTasks * threads, each = std::max<size_t>(1, blocks / most_tasks);
  const size_t slices = std::min(groups / 2, divide_up(most_tasks, blocks));
  parallel_for(int(divide_up(blocks, each) * slices), [&](int task) {
    const size_t first = size_t(task) / slices * each, end = std::min(blocks, first + each), slice = size_t(task) % slices;
    const size_t first_group = share(groups, slice, slices), end_group = share(groups, slice + 1, slices);
    for (size_t block = first; block < end; block++) multiply(block, first_group, end_group, block + 1 < end);
  });
}

}  // namespace phalanx
