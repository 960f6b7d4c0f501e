// Searches along rows. Part of `operator_kernels.cpp`, compiled once for each instruction set.
#pragma once
#include "operators.hpp"
#include "select.hpp"
#include "vector_math.hpp"

namespace phalanx {
namespace {

// Ranks of kWidth numbers, as `rank_of` has them.
#if defined(__AVX512F__)
using Ranks = __m512i;
inline Ranks ranks_of(V number) {
  number = add(number, all(0));  // which makes both zeros one
  const __m512i bits = _mm512_castps_si512(number);
  const __m512i flipped = _mm512_xor_si512(bits, _mm512_srli_epi32(_mm512_srai_epi32(bits, 31), 1));
  return _mm512_mask_mov_epi32(flipped, _mm512_cmp_ps_mask(number, number, _CMP_UNORD_Q), _mm512_set1_epi32(INT32_MAX));
}
inline Ranks larger_ranks(Ranks a, Ranks b) { return _mm512_max_epi32(a, b); }
inline uint32_t above_mask(Ranks a, int32_t floor) { return _mm512_cmpgt_epi32_mask(a, _mm512_set1_epi32(floor)); }
inline Ranks all_ranks(int32_t rank) { return _mm512_set1_epi32(rank); }
#elif defined(__AVX2__)
using Ranks = __m256i;
inline Ranks ranks_of(V number) {
  number = add(number, all(0));
  const __m256i bits = _mm256_castps_si256(number);
  const __m256i flipped = _mm256_xor_si256(bits, _mm256_srli_epi32(_mm256_srai_epi32(bits, 31), 1));
  const __m256i none = _mm256_castps_si256(_mm256_cmp_ps(number, number, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(flipped, _mm256_set1_epi32(INT32_MAX), none);
}
inline Ranks larger_ranks(Ranks a, Ranks b) { return _mm256_max_epi32(a, b); }
inline uint32_t above_mask(Ranks a, int32_t floor) {
  return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, _mm256_set1_epi32(floor)))));
}
inline Ranks all_ranks(int32_t rank) { return _mm256_set1_epi32(rank); }
#else
using Ranks = int32_t;
inline Ranks ranks_of(V number) { return rank_of(number); }
inline Ranks larger_ranks(Ranks a, Ranks b) { return a > b ? a : b; }
inline uint32_t above_mask(Ranks a, int32_t floor) { return a > floor; }
inline Ranks all_ranks(int32_t rank) { return rank; }
#endif

inline float one(const float* from) { return *from; }
inline float one(const BF16* from) {
  const uint32_t bits = uint32_t(from->bits) << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}
inline float one(const F16* from) {
  _Float16 number;
  std::memcpy(&number, from, sizeof number);
  return float(number);
}

constexpr size_t kAtOnce = 4;  // registers

// Calls found(column, rank) for numbers above `floor`, which may rise as it returns a new one.
template <typename T, typename Found>
inline void each_above(const T* row, size_t first, size_t count, int32_t floor, Found&& found) {
  size_t i = first;
  for (; i + kAtOnce * kWidth <= count; i += kAtOnce * kWidth) {
    Ranks top = ranks_of(load(row + i));
    for (size_t j = 1; j < kAtOnce; j++) top = larger_ranks(top, ranks_of(load(row + i + j * kWidth)));
    if (__builtin_expect(above_mask(top, floor) == 0, true)) continue;
    for (size_t j = 0; j < kAtOnce; j++) {
      for (uint32_t mask = above_mask(ranks_of(load(row + i + j * kWidth)), floor); mask != 0; mask &= mask - 1) {
        const size_t column = i + j * kWidth + size_t(__builtin_ctz(mask));
        floor = found(column, floor);
      }
    }
  }
  for (; i < count; i++) {
    if (rank_of(one(row + i)) > floor) floor = found(i, floor);
  }
}

template <typename T>
Largest argmax(const void* numbers, size_t count) {
  const T* row = static_cast<const T*>(numbers);
  Largest best{0, rank_of(one(row))};
  each_above(row, 1, count, best.rank, [&](size_t column, int32_t floor) {
    const int32_t rank = rank_of(one(row + column));
    if (rank <= floor) return floor;
    best = {uint32_t(column), rank};
    return rank;
  });
  return best;
}

size_t above(const float* row, size_t first, size_t count, int32_t floor, uint32_t* columns) {
  size_t num_found = 0;
  each_above(row, first, count, floor, [&](size_t column, int32_t same) {
    columns[num_found++] = uint32_t(column);
    return same;
  });
  return num_found;
}

}  // namespace
}  // namespace phalanx
