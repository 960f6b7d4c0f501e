// Compiled once for each instruction set; see `reduce_kernels.cpp` for what that asks of a file.
#include <cstring>

#include "linear.hpp"
#include <immintrin.h>

#define PHALANX_JOIN_OF(a, b) a##b
#define PHALANX_JOIN(a, b) PHALANX_JOIN_OF(a, b)
#define PHALANX_TEXT_OF(name) #name
#define PHALANX_TEXT(name) PHALANX_TEXT_OF(name)

namespace phalanx {
namespace {

// V: as many floats as a register holds. Pair: two inputs of a row, as they are multiplied.
#if defined(__AVX512F__)

using V = __m512;
constexpr size_t kMostRows = 12, kVectors = 2;  // rows times vectors of sums, and what they are made of, fill 32 registers
inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, V v) { _mm512_storeu_ps(to, v); }

#if defined(__AVX512BF16__)

using Pair = uint32_t;
struct W { __m512bh both; };
inline W load_w(const uint16_t* from) { return {(__m512bh)_mm512_loadu_si512(from)}; }
inline V add_product(V sum, W w, Pair x) { return _mm512_dpbf16_ps(sum, w.both, (__m512bh)_mm512_set1_epi32(int(x))); }
inline Pair make_pair(uint16_t even, uint16_t odd) { return Pair(odd) << 16 | even; }

#else

struct Pair { float even, odd; };
struct W { V even, odd; };
inline W load_w(const uint16_t* from) {
  const __m512i both = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))))};
}
inline V add_product(V sum, W w, const Pair& x) {
  sum = _mm512_fmadd_ps(w.even, _mm512_set1_ps(x.even), sum);
  return _mm512_fmadd_ps(w.odd, _mm512_set1_ps(x.odd), sum);
}

#endif

#else

using V = __m256;
constexpr size_t kMostRows = 4, kVectors = 2;  // of 16 registers, four hold a vector's pairs, widened
inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, V v) { _mm256_storeu_ps(to, v); }
struct Pair { float even, odd; };
struct W { V even, odd; };
inline W load_w(const uint16_t* from) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xFFFF0000))))};
}
inline V add_product(V sum, W w, const Pair& x) {
  sum = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(&x.even), sum);
  return _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(&x.odd), sum);
}

#endif

constexpr size_t kWidth = sizeof(V) / sizeof(float);
constexpr size_t kColumns = kVectors * kWidth;  // of one pass over the block

inline float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
// To the nearest, ties to even; not-a-number stays one.
inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return value != value ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
#if !defined(__AVX512BF16__)
inline Pair make_pair(uint16_t even, uint16_t odd) { return {widen(even), widen(odd)}; }
#endif

template <size_t kRows>
void pack(Pair* out, const uint16_t* x, size_t x_stride, size_t num_inputs) {
  for (size_t k = 0; k < num_inputs / 2; k++) {
    for (size_t row = 0; row < kRows; row++) {
      uint16_t both[2];
      std::memcpy(both, x + row * x_stride + 2 * k, sizeof both);
      out[k * kRows + row] = make_pair(both[0], both[1]);
    }
  }
  if (num_inputs % 2 == 0) return;
  const size_t last = num_inputs / 2;
  for (size_t row = 0; row < kRows; row++) out[last * kRows + row] = make_pair(x[row * x_stride + 2 * last], 0);
}

template <size_t kRows>
void multiply(const Tile& tile) {
  for (size_t column = 0; column < kBlockColumns; column += kColumns) {
    V sums[kRows][kVectors];
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) {
        sums[row][v] = tile.first ? zero() : load(tile.partial + row * kBlockColumns + column + v * kWidth);
      }
    }
    const Pair* x = static_cast<const Pair*>(tile.x);
    const uint16_t* w = tile.w + 2 * column;
    const char* ahead = tile.ahead;
    const size_t ahead_step = tile.ahead_step;
#pragma GCC unroll 2
    for (size_t k = 0; k < tile.num_pairs; k++) {
      _mm_prefetch(ahead, _MM_HINT_T0);
      _mm_prefetch(ahead + 64, _MM_HINT_T0);
      ahead += ahead_step;
      W pairs[kVectors];
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) pairs[v] = load_w(w + 2 * v * kWidth);
#pragma GCC unroll 16
      for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; v++) sums[row][v] = add_product(sums[row][v], pairs[v], x[row]);
      }
      x += kRows;
      w += 2 * kBlockColumns;
    }
    float* to = tile.partial;
    alignas(64) float whole[kRows * kBlockColumns];
    if (tile.last) to = whole;
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) store(to + row * kBlockColumns + column + v * kWidth, sums[row][v]);
    }
    if (!tile.last) continue;
    const size_t end = tile.num_columns < column + kColumns ? tile.num_columns : column + kColumns;
    for (size_t row = 0; row < kRows; row++) {
      const float* from = whole + row * kBlockColumns;
      uint16_t* y = tile.y + row * tile.y_stride;
      if (tile.bias != nullptr) {
        for (size_t i = column; i < end; i++) y[i] = narrow(from[i] + widen(tile.bias[i]));
      } else {
        for (size_t i = column; i < end; i++) y[i] = narrow(from[i]);
      }
    }
  }
}

using Pack = void (*)(Pair*, const uint16_t*, size_t, size_t);
constexpr Pack kPacks[] = {nullptr,  pack<1>, pack<2>, pack<3>,
#if defined(__AVX512F__)
                           pack<4>,  pack<5>, pack<6>, pack<7>, pack<8>, pack<9>, pack<10>, pack<11>, pack<12>};
#else
                           pack<4>};
#endif

void pack_rows(void* out, const uint16_t* x, size_t x_stride, size_t num_rows, size_t num_inputs) {
  kPacks[num_rows](static_cast<Pair*>(out), x, x_stride, num_inputs);
}

}  // namespace

extern const LinearKernels PHALANX_JOIN(kLinear_, PHALANX_SET);
const LinearKernels PHALANX_JOIN(kLinear_, PHALANX_SET) = {
    PHALANX_TEXT(PHALANX_SET),
    kMostRows,
    sizeof(Pair),
    pack_rows,
    {nullptr, multiply<1>, multiply<2>, multiply<3>, multiply<4>,
#if defined(__AVX512F__)
     multiply<5>, multiply<6>, multiply<7>, multiply<8>, multiply<9>, multiply<10>, multiply<11>, multiply<12>,
#endif
    },
};

}  // namespace phalanx
