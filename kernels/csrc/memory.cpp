#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "pool.hpp"

namespace phalanx {

bool advise_huge_pages(void* memory, size_t num_bytes) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + page - 1) / page * page, last = (begin + num_bytes) / page * page;
  return first < last && madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE) == 0;
}

uint64_t read_memory(const void* memory, size_t num_bytes) {
  constexpr size_t kLine = 64, kAhead = 4096;
  const char* const bytes = static_cast<const char*>(memory);
  const size_t lines = num_bytes / kLine, pieces = size_t(4 * Pool::instance().size());
  std::atomic<uint64_t> total{0};
  parallel_for(int(pieces), [&](int piece) {
    uint64_t sums[8] = {};
    const size_t end = lines * (size_t(piece) + 1) / pieces;
    for (size_t line = lines * size_t(piece) / pieces; line < end; line++) {
      __builtin_prefetch(bytes + line * kLine + kAhead);
      uint64_t words[8];
      std::memcpy(words, bytes + line * kLine, kLine);
      for (int word = 0; word < 8; word++) sums[word] += words[word];
    }
    uint64_t sum = 0;
    for (uint64_t each : sums) sum += each;
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  uint64_t sum = total.load();
  for (size_t at = lines * kLine; at < num_bytes; at += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + at, std::min(sizeof word, num_bytes - at));
    sum += word;
  }
  return sum;
}

}  // namespace phalanx
