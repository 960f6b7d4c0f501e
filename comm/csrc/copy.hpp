// Copies into memory that another core reads next.
#pragma once
#include <emmintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "reduce.hpp"

namespace phalanx {

// From this size on data goes past the caches. A plain copy first fetches each line from the reader's cache, where the
// last round left it, and leaves it dirty in the writer's, where the reader has to fetch it from: on 2 Zen 4 cores
// exchanging 128 KB takes 26 to 65 us by plain copies and 15 us by streaming ones. Below, the way to memory takes longer.
constexpr size_t kStreamBytes = 4096;

inline void copy_out(char* to, const char* from, size_t num_bytes) {
  if (num_bytes < kStreamBytes) {
    if (num_bytes > 0) std::memcpy(to, from, num_bytes);
    return;
  }
  const size_t head = size_t(-reinterpret_cast<uintptr_t>(to)) % 64;
  std::memcpy(to, from, head);
  const size_t lines = (num_bytes - head) / 64, done = head + lines * 64;
  kernels().stream(to + head, from + head, lines);
  std::memcpy(to + done, from + done, num_bytes - done);
  _mm_sfence();  // streaming stores are the ones that x86-64 does not keep in order
}

}  // namespace phalanx
