// What products are written in, in the instruction set that a file is compiled for. Only for `linear_kernels.cpp`.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "packed.hpp"

namespace phalanx {
namespace {

// V: as many floats as a register holds. Pair: two inputs of a row, as they are multiplied.
#if defined(__AVX512F__)

using V = __m512;
constexpr size_t kMostRows = 12;  // rows times two vectors of sums, and what they are made of, fill 32 registers
inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, V v) { _mm512_storeu_ps(to, v); }

using Bits = __m512i;  // pairs of weights
inline Bits load_bits(const uint8_t* from) { return _mm512_loadu_si512(from); }
inline void store_bits(uint8_t* to, Bits bits) { _mm512_storeu_si512(to, bits); }
inline Bits set_bytes(uint8_t byte) { return _mm512_set1_epi8(char(byte)); }
inline Bits load_table(const uint8_t* from) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Bits look_up(Bits table, Bits codes) { return _mm512_shuffle_epi8(table, codes); }
inline Bits both(Bits a, Bits b) { return _mm512_and_si512(a, b); }
inline Bits shift_right(Bits bits, size_t by) { return _mm512_srl_epi16(bits, _mm_cvtsi64_si128(int64_t(by))); }
// Where the mask is set resp. is not, bits of a; and all of b.
inline Bits insert(Bits a, Bits mask, Bits b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xEA); }
inline Bits insert_others(Bits a, Bits mask, Bits b) { return _mm512_ternarylogic_epi32(a, mask, b, 0xBA); }
inline Bits interleave_first(Bits low, Bits high) { return _mm512_unpacklo_epi8(low, high); }
inline Bits interleave_last(Bits low, Bits high) { return _mm512_unpackhi_epi8(low, high); }
inline V widen_all(const uint16_t* from) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store_narrow(uint16_t* to, V v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
  const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                             _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(high));
}
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline void hold(V&) {}

#if defined(__AVX512BF16__)

using Pair = uint32_t;
struct W { __m512bh both; };
inline W widen(Bits bits) { return {(__m512bh)bits}; }
inline V add_product(V sum, W w, Pair x) { return _mm512_dpbf16_ps(sum, w.both, (__m512bh)_mm512_set1_epi32(int(x))); }
inline Pair make_pair(uint16_t even, uint16_t odd) { return Pair(odd) << 16 | even; }

#else

struct Pair { float even, odd; };
struct W { V even, odd; };
inline W widen(Bits both) {
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
constexpr size_t kMostRows = 4;  // of 16 registers, four hold a vector's pairs, widened
inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* from) { return _mm256_loadu_ps(from); }
inline void store(float* to, V v) { _mm256_storeu_ps(to, v); }

using Bits = __m256i;
inline Bits load_bits(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void store_bits(uint8_t* to, Bits bits) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits); }
inline Bits set_bytes(uint8_t byte) { return _mm256_set1_epi8(char(byte)); }
inline Bits load_table(const uint8_t* from) {
  return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Bits look_up(Bits table, Bits codes) { return _mm256_shuffle_epi8(table, codes); }
inline Bits both(Bits a, Bits b) { return _mm256_and_si256(a, b); }
inline Bits shift_right(Bits bits, size_t by) { return _mm256_srl_epi16(bits, _mm_cvtsi64_si128(int64_t(by))); }
inline Bits insert(Bits a, Bits mask, Bits b) { return _mm256_or_si256(_mm256_and_si256(a, mask), b); }
inline Bits insert_others(Bits a, Bits mask, Bits b) { return _mm256_or_si256(_mm256_andnot_si256(mask, a), b); }
inline Bits interleave_first(Bits low, Bits high) { return _mm256_unpacklo_epi8(low, high); }
inline Bits interleave_last(Bits low, Bits high) { return _mm256_unpackhi_epi8(low, high); }
inline V widen_all(const uint16_t* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline void store_narrow(uint16_t* to, V v) {
  const __m256i bits = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7FC0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
// In a register: else the compiler has a sum wait in memory, to begin with the next weights sooner.
inline void hold(V& v) { asm("" : "+x"(v)); }

struct Pair { float even, odd; };
struct W { V even, odd; };
inline W widen(Bits both) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xFFFF0000))))};
}
inline V add_product(V sum, W w, const Pair& x) {
  sum = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(&x.even), sum);
  return _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(&x.odd), sum);
}

#endif

constexpr size_t kWidth = sizeof(V) / sizeof(float);
constexpr size_t kVectors = 2;            // of one pass over the block: from outputs `column` and 16 + `column` on
constexpr size_t kHalf = kBlockColumns / kVectors;

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

template <bool kOdd>
inline float one_of(const Pair& x) {
#if defined(__AVX512BF16__)
  return widen(uint16_t(kOdd ? x >> 16 : x));
#else
  return kOdd ? x.odd : x.even;
#endif
}

template <size_t kBytes, _mm_hint kHint>
inline void prefetch(const uint8_t* from) {
#pragma GCC unroll 4
  for (size_t at = 0; at < kBytes; at += 64) _mm_prefetch(reinterpret_cast<const char*>(from + at), kHint);
}

// Sums [kRows, kBlockColumns] and the bias, or null, into the columns that y has.
template <size_t kRows>
void store_rows(uint16_t* to, size_t stride, size_t num_columns, const uint16_t* bias, const float* sums) {
  for (size_t row = 0; row < kRows; row++) {
    const float* from = sums + row * kBlockColumns;
    uint16_t* y = to + row * stride;
    if (num_columns == kBlockColumns) {
#pragma GCC unroll 4
      for (size_t i = 0; i < kBlockColumns; i += kWidth) {
        const V sum = load(from + i);
        store_narrow(y + i, bias == nullptr ? sum : add(sum, widen_all(bias + i)));
      }
    } else {
      for (size_t i = 0; i < num_columns; i++) y[i] = narrow(bias == nullptr ? from[i] : from[i] + widen(bias[i]));
    }
  }
}

}  // namespace
}  // namespace phalanx
