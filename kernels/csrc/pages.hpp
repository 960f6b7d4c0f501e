// Pages of 8 bits: what a head of a token is written as and read back from. A head is numbers times one scale, a
// bfloat16; int8 and e4m3 (4 bits of exponent, 3 of mantissa: Micikevicius et al. 2022, arXiv 2209.05433) are both exact
// in bfloat16, so that what is read is multiplied as numbers of the model are, and the scale comes behind the sum. Of e4m3
// no subnormal number is written: `kernels/kv_format.py`. Part of `operator_kernels.cpp`, compiled once for each set.
#pragma once
#include "vector_math.hpp"

namespace phalanx {
namespace {

struct I8 {
  static constexpr float kLargest = 127;
  uint8_t bits;
};
struct E4M3 {
  static constexpr float kLargest = 448;
  uint8_t bits;
};

// The least that counts as the largest magnitude of a head: one of zeros has a scale, too (`kernels/quantised_rows.py`).
constexpr float kLeastAmax = 1e-30f;

// kWidth numbers, without their scale. With its bits where a float16 has them an e4m3, subnormal or not, is 2^8 too small;
// its not-a-number comes out as 480, for where there is one the scale is none either.
#if defined(__AVX512F__)
inline V load(const I8* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline V load(const E4M3* from) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i half = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(short(0xBFFF)));
  return _mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256));
}
#elif defined(__AVX2__)
inline V load(const I8* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline V load(const E4M3* from) {
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  const __m128i half = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(short(0xBFFF)));
  return _mm256_mul_ps(_mm256_cvtph_ps(half), _mm256_set1_ps(256));
}
#else
inline V load(const I8* from) { return float(int8_t(from->bits)); }
inline V load(const E4M3* from) {
  const F16 half{uint16_t((from->bits & 0x80) << 8 | (from->bits & 0x7F) << 7)};
  return load(&half) * 256;
}
#endif

// How many times too small numbers are as bfloat16, so that queries and weights are lifted by the one, and what they come
// to by the other: what neither makes too small or too large for a float32.
template <typename C>
struct Lift {
  static constexpr float kBefore = 1, kBehind = 1;
};
#if defined(__AVX512BF16__)
// With its bits where a bfloat16 has them an e4m3 that is not subnormal, of which none is written, is 2^120 too small.
template <>
struct Lift<E4M3> {
  static constexpr float kBefore = 0x1p64f, kBehind = 0x1p56f;
};

// 32 codes as bfloat16.
inline __m512i widened(const I8*, __m256i codes) {
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
inline __m512i widened(const E4M3*, __m256i codes) {
  return _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 4), _mm512_set1_epi16(short(0x87F0)));
}

// Of each lane's four codes, the first and third byte and the second and fourth, as pairs of bfloat16.
inline void widened(const E4M3*, __m512i codes, __m512i& even, __m512i& odd) {
  const __m512i kept = _mm512_set1_epi16(short(0x87F0));
  even = _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(codes, 8), 4), kept);
  odd = _mm512_and_si512(_mm512_srai_epi16(codes, 4), kept);
}
// Two registers of small whole numbers as pairs: as floats they have no bits below a bfloat16's.
inline __m512i paired(__m512i first, __m512i second) {
  const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(first)), 16);
  const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(second));
  return _mm512_ternarylogic_epi32(low, high, _mm512_set1_epi32(int(0xFFFF0000)), 0xF8);
}
inline void widened(const I8*, __m512i codes, __m512i& even, __m512i& odd) {
  const auto byte = [codes](unsigned above) { return _mm512_srai_epi32(_mm512_slli_epi32(codes, above), 24); };
  even = paired(byte(24), byte(8));
  odd = paired(byte(16), _mm512_srai_epi32(codes, 24));
}

// 32 numbers as bfloat16, of those that the mask has; zeros elsewhere.
inline __m512i numbers_at(const BF16* from, __mmask32 there) { return _mm512_maskz_loadu_epi16(there, from); }
template <typename C>
inline __m512i numbers_at(const C* from, __mmask32 there) {
  return widened(from, _mm256_maskz_loadu_epi8(there, from));
}
inline __m512i numbers_at(const BF16* from) { return _mm512_loadu_si512(from); }
template <typename C>
inline __m512i numbers_at(const C* from) {
  return widened(from, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#endif

// To nearest, ties to even, of what is no larger than the format's largest by more than rounding.
inline I8 code_of(const I8*, float x) { return {uint8_t(int8_t(int32_t(__builtin_rintf(x))))}; }
inline E4M3 code_of(const E4M3*, float x) {
  const float size = __builtin_fabsf(x);
  uint32_t bits, sign;
  std::memcpy(&bits, &size, sizeof bits);
  std::memcpy(&sign, &x, sizeof sign);
  // A bias of 127 is made into one of 7; what is below 2^-6, the least normal number, becomes zero.
  const uint32_t normal = (bits - (120u << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20;
  const uint32_t code = bits > 0x43E80000 ? 0x7F : normal;  // not-a-number from 464 on
  return {uint8_t((size < 0.015625f ? 0 : code) | (sign >> 24 & 0x80))};
}

// `scale` is the bfloat16 at or above the largest magnitude through the format's, `to` the numbers through it.
template <typename T, typename C>
inline void quantise_head(C* to, uint16_t* scale, const T* from, size_t count) {
  constexpr size_t kChunk = 64;
  float numbers[kChunk];
  const auto take = [&](size_t first) {
    const size_t taken = count - first < kChunk ? count - first : kChunk;
    size_t i = 0;
    for (; i + kWidth <= taken; i += kWidth) store(numbers + i, load(from + first + i));
    if (i < taken) {
      T rest[kWidth] = {};
      std::memcpy(rest, from + first + i, (taken - i) * sizeof(T));
      store(numbers + i, load(rest));
    }
    return taken;
  };
  V top = all(kLeastAmax);
  for (size_t first = 0; first < count; first += kChunk) {
    const size_t taken = take(first);
    for (size_t i = 0; i < taken; i += kWidth) {
      const V x = load(numbers + i);
      top = larger(top, larger(x, subtract(all(0), x)));
    }
  }
  store(numbers, top);
  float amax = numbers[0];
  for (size_t lane = 1; lane < kWidth; lane++) {
    if (amax == amax && !(numbers[lane] <= amax)) amax = numbers[lane];
  }
  const float exact = amax / C::kLargest;
  uint32_t bits;
  std::memcpy(&bits, &exact, sizeof bits);
  bits = (bits + 0xFFFF) & 0xFFFF0000;
  *scale = uint16_t(bits >> 16);
  float rounded;
  std::memcpy(&rounded, &bits, sizeof rounded);
  const float inverse = 1.0f / rounded;
  for (size_t first = 0; first < count; first += kChunk) {
    const size_t taken = take(first);
    for (size_t i = 0; i < taken; i++) to[first + i] = code_of(to, numbers[i] * inverse);
  }
}

}  // namespace
}  // namespace phalanx
