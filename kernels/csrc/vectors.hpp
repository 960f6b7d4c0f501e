// Registers of floats, as wide as the instruction set has them. For files that are compiled once for each instruction
// set: nothing here may be seen from another file, for of a function that two of them share the linker would keep one,
// perhaps one that this processor cannot run.
//
// What is here gives the same bits in all sets. AVX-512's conversion to bfloat16 takes subnormal numbers for zero and
// passes parts of a not-a-number on, so that where either turns up the steps of the set without it are taken.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace phalanx {
namespace {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// V: as many floats as a register holds. load and store convert; to narrow types by rounding to the nearest, ties to
// even, where not-a-number stays one.
#if defined(__AVX512F__)

using V = __m512;
struct Pair { V a, b; };
inline V load(const float* from) { return _mm512_loadu_ps(from); }
inline V load(const BF16* from) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V load(const F16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
inline void store(float* to, V v) { _mm512_storeu_ps(to, v); }
inline __m512i round_high(V v) {
  __m512i bits = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF));
  return _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC00000));
}
inline void store(BF16* to, V v) {
  __m512i rounded = _mm512_srli_epi32(round_high(v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded));
}
#if defined(__AVX512BF16__)
constexpr int kRare = 0x01 | 0x20 | 0x80;  // classes of numbers: quiet not-a-number, subnormal, signalling not-a-number
#endif
inline void store(F16* to, V v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline Pair load_pair(const BF16* from) {
  __m512i both = _mm512_loadu_si512(from);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xFFFF0000))))};
}
inline void store_pair(BF16* to, Pair v) {
#if defined(__AVX512BF16__)
  if (__builtin_expect((_mm512_fpclass_ps_mask(v.a, kRare) | _mm512_fpclass_ps_mask(v.b, kRare)) == 0, true)) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(v.b, v.a);
    // 0, 16, 1, 17, ...: the even and the odd ones in turns.
    const __m512i turns = _mm512_add_epi32(
        _mm512_set1_epi32(0x00100000),
        _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(turns, halves));
    return;
  }
#endif
  __m512i odd = _mm512_and_si512(round_high(v.b), _mm512_set1_epi32(int(0xFFFF0000)));
  _mm512_storeu_si512(to, _mm512_or_si512(_mm512_srli_epi32(round_high(v.a), 16), odd));
}
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V multiply(V a, V b) { return _mm512_mul_ps(a, b); }
inline V all(float x) { return _mm512_set1_ps(x); }
inline V larger(V a, V b) {
  __mmask16 first = _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) | _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
  return _mm512_mask_mov_ps(b, first, a);
}

#elif defined(__AVX2__)

using V = __m256;
struct Pair { V a, b; };
inline __m128i narrow_load(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
inline V load(const float* from) { return _mm256_loadu_ps(from); }
inline V load(const BF16* from) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow_load(from)), 16));
}
inline V load(const F16* from) { return _mm256_cvtph_ps(narrow_load(from)); }
inline void store(float* to, V v) { _mm256_storeu_ps(to, v); }
inline __m256i round_high(V v) {
  __m256i bits = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF));
  __m256i no_number = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), no_number);
}
inline void store(BF16* to, V v) {
  __m256i rounded = _mm256_srli_epi32(round_high(v), 16);
  // Packing works within halves of 128 bits.
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(packed));
}
inline Pair load_pair(const BF16* from) {
  __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xFFFF0000))))};
}
inline void store_pair(BF16* to, Pair v) {
  __m256i odd = _mm256_and_si256(round_high(v.b), _mm256_set1_epi32(int(0xFFFF0000)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_or_si256(_mm256_srli_epi32(round_high(v.a), 16), odd));
}
inline void store(F16* to, V v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V multiply(V a, V b) { return _mm256_mul_ps(a, b); }
inline V all(float x) { return _mm256_set1_ps(x); }
inline V larger(V a, V b) {
  V first = _mm256_or_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_ps(b, a, first);
}

#else

using V = float;
struct Pair { V a, b; };
inline V load(const float* from) { return *from; }
inline V load(const BF16* from) {
  uint32_t bits = uint32_t(from->bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline V load(const F16* from) {
  _Float16 value;
  std::memcpy(&value, from, sizeof value);
  return float(value);
}
inline void store(float* to, V v) { *to = v; }
inline void store(BF16* to, V v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  to->bits = v != v ? 0x7FC0 : uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline void store(F16* to, V v) {
  _Float16 value = _Float16(v);
  std::memcpy(to, &value, sizeof value);
}
inline V add(V a, V b) { return a + b; }
inline V multiply(V a, V b) { return a * b; }
inline V all(float x) { return x; }
inline V larger(V a, V b) { return a > b || a != a ? a : b; }

#endif

constexpr size_t kWidth = sizeof(V) / sizeof(float);

// Twice as many, in whatever order is cheapest; of bfloat16 the even and the odd ones, which takes half the instructions
// of widening one register after the other.
template <typename T>
inline Pair load_pair(const T* from) {
  return {load(from), load(from + kWidth)};
}
template <typename T>
inline void store_pair(T* to, Pair v) {
  store(to, v.a);
  store(to + kWidth, v.b);
}

// The numbers of a pair of T, as floats in the order of memory.
template <typename T>
inline void spread(float* to, Pair v) {
  float a[kWidth], b[kWidth];
  std::memcpy(a, &v.a, sizeof a);
  std::memcpy(b, &v.b, sizeof b);
  constexpr bool kTurns = std::is_same<T, BF16>::value && kWidth > 1;
  for (size_t i = 0; i < kWidth; i++) {
    to[kTurns ? 2 * i : i] = a[i];
    to[kTurns ? 2 * i + 1 : kWidth + i] = b[i];
  }
}

}  // namespace
}  // namespace phalanx
