// Pages of 8 bits: what a head of a token is written as and read back from. A head is numbers times one scale, a
// bfloat16; int8 and e4m3 (4 bits of exponent, 3 of mantissa: Micikevicius et al. 2022, arXiv 2209.05433) are both exact
// in bfloat16, so that what is read is multiplied as numbers of the model are, and the scale comes behind the sum. Part of
// `operator_kernels.cpp`, compiled once for each instruction set.
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

#if defined(__AVX512BF16__)
// The bytes of the bfloat16 of each magnitude, low and high: looked up, 64 at a time.
struct Halves {
  alignas(64) uint8_t low[128], high[128];
};

// count / 2^shift, count below 256.
constexpr uint16_t bfloat16_of(unsigned count, int shift) {
  if (count == 0) return 0;
  int exponent = 7;
  while (count < 128) count <<= 1, exponent--;
  return uint16_t(unsigned(exponent - shift + 127) << 7 | (count & 0x7F));
}
constexpr uint16_t magnitude(const I8*, unsigned code) { return bfloat16_of(code, 0); }
constexpr uint16_t magnitude(const E4M3*, unsigned code) {
  return code < 8 ? bfloat16_of(code, 9) : bfloat16_of(8 + (code & 7), 10 - int(code >> 3));
}
template <typename C>
constexpr Halves halves() {
  Halves found{};
  for (unsigned code = 0; code < 128; code++) {
    const uint16_t bits = magnitude(static_cast<const C*>(nullptr), code);
    found.low[code] = uint8_t(bits);
    found.high[code] = uint8_t(bits >> 8);
  }
  return found;
}
template <typename C>
constexpr Halves kHalves = halves<C>();

inline __m512i magnitudes(const I8*, __m512i codes) { return _mm512_abs_epi8(codes); }
inline __m512i magnitudes(const E4M3*, __m512i codes) { return codes; }

// Each of 32 bytes twice.
struct Twice {
  alignas(64) uint8_t place[64];
};
constexpr Twice twice_each() {
  Twice found{};
  for (unsigned i = 0; i < 64; i++) found.place[i] = uint8_t(i / 2);
  return found;
}
constexpr Twice kTwice = twice_each();

// 32 codes as bfloat16.
template <typename C>
inline __m512i widened(const C* kind, __m256i codes) {
  const __m512i twice = _mm512_permutexvar_epi8(_mm512_load_si512(kTwice.place), _mm512_castsi256_si512(codes));
  constexpr __mmask64 kLow = 0x5555555555555555;
  const auto looked_up = [index = magnitudes(kind, twice)](const uint8_t (&table)[128]) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  };
  const __m512i found = _mm512_mask_mov_epi8(looked_up(kHalves<C>.high), kLow, looked_up(kHalves<C>.low));
  // And the sign.
  return _mm512_ternarylogic_epi32(found, twice, _mm512_set1_epi16(short(0x8000)), 0xF8);
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
  uint32_t bits, sign, steps;
  std::memcpy(&bits, &size, sizeof bits);
  std::memcpy(&sign, &x, sizeof sign);
  // Below 2^-6, the least normal number, in steps of 2^-9; above with a bias of 127 made into one of 7.
  const float counted = size * 512.0f + 8388608.0f;
  std::memcpy(&steps, &counted, sizeof steps);
  const uint32_t normal = (bits - (120u << 23) + 0x7FFFF + ((bits >> 20) & 1)) >> 20;
  const uint32_t code = size < 0.015625f ? steps & 0xFF : normal;
  return {uint8_t((bits > 0x43E80000 ? 0x7F : code) | (sign >> 24 & 0x80))};  // not-a-number from 464 on
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
