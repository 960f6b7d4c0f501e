#include "widen.hpp"

#include <algorithm>
#include <cstring>

#include "pool.hpp"

namespace phalanx {
namespace {

// Written by one thread at a time: half a second-level cache.
constexpr size_t kPiece = 32768;

// A bfloat16 is the upper half of the float32 of the same value.
void widen_piece(float* out, const uint16_t* x, size_t count) {
  for (size_t i = 0; i < count; i++) {
    const uint32_t bits = uint32_t(x[i]) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

}  // namespace

void widen(float* out, const uint16_t* x, size_t count) {
  parallel_for(int((count + kPiece - 1) / kPiece), [&](int piece) {
    const size_t first = size_t(piece) * kPiece;
    widen_piece(out + first, x + first, std::min(kPiece, count - first));
  });
}

}  // namespace phalanx
