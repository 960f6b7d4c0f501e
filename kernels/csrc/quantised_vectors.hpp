// What products by quantised weights need beside `linear_vectors.hpp`, in the instruction set of the file.
#pragma once
#include "linear_vectors.hpp"
#include "quantised.hpp"

namespace phalanx {
namespace {

#if defined(__AVX512F__)
inline V multiply_add(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V set_all(float value) { return _mm512_set1_ps(value); }
inline V widen_half(const uint16_t* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline V widen_bytes(const uint8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline V times(V a, V b) { return _mm512_mul_ps(a, b); }
template <size_t kBy>
inline Bits shift_right(Bits bits) { return _mm512_srli_epi16(bits, kBy); }
inline Bits masked_or(Bits bits, Bits mask, Bits set) { return _mm512_ternarylogic_epi32(bits, mask, set, 0xEA); }
inline Bits set_words(uint16_t word) { return _mm512_set1_epi16(short(word)); }
#else
inline V multiply_add(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V set_all(float value) { return _mm256_set1_ps(value); }
inline V widen_half(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline V widen_bytes(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline V times(V a, V b) { return _mm256_mul_ps(a, b); }
template <size_t kBy>
inline Bits shift_right(Bits bits) { return _mm256_srli_epi16(bits, kBy); }
inline Bits masked_or(Bits bits, Bits mask, Bits set) { return _mm256_or_si256(_mm256_and_si256(bits, mask), set); }
inline Bits set_words(uint16_t word) { return _mm256_set1_epi16(short(word)); }
#endif

inline V load_scales(const uint8_t* from, size_t output, ScaleType type) {
  if (type == kFloatScales) return load(reinterpret_cast<const float*>(from) + output);
  const uint16_t* const words = reinterpret_cast<const uint16_t*>(from) + output;
  return type == kHalfScales ? widen_half(words) : widen_all(words);
}

}  // namespace
}  // namespace phalanx
