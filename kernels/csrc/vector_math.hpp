// Arithmetic on the registers of `vectors.hpp` that need not give the same bits in all sets: it multiplies and adds in
// one rounding where the set can.
#pragma once
#include "vectors.hpp"

namespace phalanx {
namespace {

#if defined(__AVX512F__)

inline V subtract(V a, V b) { return _mm512_sub_ps(a, b); }
inline V divide(V a, V b) { return _mm512_div_ps(a, b); }
inline V madd(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V nmadd(V a, V b, V c) { return _mm512_fnmadd_ps(a, b, c); }
// Of two, where one is not a number the second.
inline V most(V a, V b) { return _mm512_max_ps(a, b); }
inline V least(V a, V b) { return _mm512_min_ps(a, b); }
inline V nearest(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power(V a, V n) { return _mm512_scalef_ps(a, n); }
inline V zero_below(V a, V x, float limit) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(limit), _CMP_NLT_UQ), a);
}
inline float sum_of(V v) {
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float largest_of(V v) { return _mm512_reduce_max_ps(v); }

#elif defined(__AVX2__)

inline V subtract(V a, V b) { return _mm256_sub_ps(a, b); }
inline V divide(V a, V b) { return _mm256_div_ps(a, b); }
inline V madd(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V nmadd(V a, V b, V c) { return _mm256_fnmadd_ps(a, b, c); }
inline V most(V a, V b) { return _mm256_max_ps(a, b); }
inline V least(V a, V b) { return _mm256_min_ps(a, b); }
inline V nearest(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline V times_power(V a, V n) {
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}
inline V zero_below(V a, V x, float limit) {
  return _mm256_and_ps(a, _mm256_cmp_ps(x, _mm256_set1_ps(limit), _CMP_NLT_UQ));
}
inline float sum_of(V v) {
  __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  quarter = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)));
}
inline float largest_of(V v) {
  __m128 quarter = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  quarter = _mm_max_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_max_ss(quarter, _mm_movehdup_ps(quarter)));
}

#else

inline V subtract(V a, V b) { return a - b; }
inline V divide(V a, V b) { return a / b; }
inline V madd(V a, V b, V c) { return a * b + c; }
inline V nmadd(V a, V b, V c) { return c - a * b; }
inline V most(V a, V b) { return a > b ? a : b; }
inline V least(V a, V b) { return a < b ? a : b; }
inline V nearest(V a) { return __builtin_rintf(a); }
inline V times_power(V a, V n) {
  const uint32_t exponent = uint32_t(int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return a * power;
}
inline V zero_below(V a, V x, float limit) { return x < limit ? 0.0f : a; }
inline float sum_of(V v) { return v; }
inline float largest_of(V v) { return v; }

#endif

// e^x within two units in the last place; zero where x is below -87, whose power is hardly a normal number, and at most
// e^88. Range reduction and polynomial after Moshier's Cephes (expf).
inline V exponential(V x) {
  const V bounded = least(all(88.0f), most(all(-87.0f), x));
  const V n = nearest(multiply(bounded, all(1.44269504f)));
  V r = nmadd(n, all(0.693359375f), bounded);
  r = nmadd(n, all(-2.12194440e-4f), r);
  V p = madd(all(1.9875691500e-4f), r, all(1.3981999507e-3f));
  p = madd(p, r, all(8.3334519073e-3f));
  p = madd(p, r, all(4.1665795894e-2f));
  p = madd(p, r, all(1.6666665459e-1f));
  p = madd(p, r, all(5.0000001201e-1f));
  p = madd(p, multiply(r, r), add(r, all(1.0f)));
  return zero_below(times_power(p, n), x, -87.0f);
}

inline V sigmoid_times(V x, V by) { return divide(by, add(all(1.0f), exponential(subtract(all(0.0f), x)))); }

inline V tanh_of(V x) {
  return subtract(all(1.0f), divide(all(2.0f), add(all(1.0f), exponential(add(x, x)))));
}

}  // namespace
}  // namespace phalanx
