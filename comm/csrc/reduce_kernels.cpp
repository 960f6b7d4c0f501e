// Compiled once for each instruction set, PHALANX_KERNELS being the name of its table; see `vectors.hpp`. All sets give
// the same bits.
#include <cstring>

#include "reduce.hpp"
#include "vectors.hpp"

namespace phalanx {
namespace {

constexpr size_t kBlock = 512;  // elements between reading and writing: well inside the first cache

// Integers wrap, as in PyTorch; in the signed types that would be undefined.
inline double add(double a, double b) { return a + b; }
inline int64_t add(int64_t a, int64_t b) { return int64_t(uint64_t(a) + uint64_t(b)); }
inline int32_t add(int32_t a, int32_t b) { return int32_t(uint32_t(a) + uint32_t(b)); }
inline int8_t add(int8_t a, int8_t b) { return int8_t(uint8_t(uint8_t(a) + uint8_t(b))); }
inline uint8_t add(uint8_t a, uint8_t b) { return uint8_t(a + b); }

// Not-a-number wins, as in torch.maximum.
template <typename T>
inline T larger(T a, T b) {
  return a > b || a != a ? a : b;
}

template <typename T, bool kMax>
inline void fold(T* total, const T* part, size_t count) {
  for (size_t i = 0; i < count; i++) total[i] = kMax ? larger(total[i], part[i]) : add(total[i], part[i]);
}

template <typename T, bool kMax>
void combine(void* out, const void* const* in, int num_in, size_t count) {
  alignas(64) T total[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    size_t size = count - start < kBlock ? count - start : kBlock;
    std::memcpy(total, static_cast<const T*>(in[0]) + start, size * sizeof(T));
    for (int rank = 1; rank < num_in; rank++) fold<T, kMax>(total, static_cast<const T*>(in[rank]) + start, size);
    std::memcpy(static_cast<T*>(out) + start, total, size * sizeof(T));
  }
}

template <bool kMax>
inline Pair fold(Pair total, Pair part) {
  if (kMax) return {larger(total.a, part.a), larger(total.b, part.b)};
  return {add(total.a, part.a), add(total.b, part.b)};
}

// The same for what is added in float, two registers at a time.
template <typename T, bool kMax>
void combine_float(void* out, const void* const* in, int num_in, size_t count) {
  constexpr size_t kStep = 2 * kWidth;
  auto part = [&](int rank, size_t i) { return static_cast<const T*>(in[rank]) + i; };
  T* result = static_cast<T*>(out);
  size_t i = 0;
  if (num_in == 2) {
    for (; i + kStep <= count; i += kStep) {
      store_pair(result + i, fold<kMax>(load_pair(part(0, i)), load_pair(part(1, i))));
    }
  }
  for (; i + kStep <= count; i += kStep) {
    Pair total = load_pair(part(0, i));
    for (int rank = 1; rank < num_in; rank++) total = fold<kMax>(total, load_pair(part(rank, i)));
    store_pair(result + i, total);
  }
  if (i == count) return;
  const size_t left = (count - i) * sizeof(T);
  T rest[kStep] = {};
  std::memcpy(rest, part(0, i), left);
  Pair total = load_pair(rest);
  for (int rank = 1; rank < num_in; rank++) {
    std::memcpy(rest, part(rank, i), left);
    total = fold<kMax>(total, load_pair(rest));
  }
  store_pair(rest, total);
  std::memcpy(result + i, rest, left);
}

}  // namespace

#define PHALANX_TEXT_OF(name) #name
#define PHALANX_TEXT(name) PHALANX_TEXT_OF(name)

const Kernels PHALANX_KERNELS = {
    PHALANX_TEXT(PHALANX_SET),
    {combine_float<BF16, false>, combine_float<F16, false>, combine_float<float, false>, combine<double, false>,
     combine<int32_t, false>, combine<int64_t, false>, combine<int8_t, false>, combine<uint8_t, false>},
    {combine_float<BF16, true>, combine_float<F16, true>, combine_float<float, true>, combine<double, true>,
     combine<int32_t, true>, combine<int64_t, true>, combine<int8_t, true>, combine<uint8_t, true>},
};

}  // namespace phalanx
