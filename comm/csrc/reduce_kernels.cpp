// Compiled once for each instruction set, PHALANX_KERNELS being the name of its table. Nothing here may be seen from
// another file: of a function that two of them share, the linker would keep one, perhaps one this processor cannot run.
//
// All sets give the same bits: no contraction to fused multiply-adds (-ffp-contract=off), and sums of squares in a fixed
// number of lanes. The bfloat16 instructions of AVX-512 are not used, since they take subnormal numbers for zero.
#include <cstring>

#include "reduce.hpp"
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace phalanx {
namespace {

constexpr size_t kBlock = 512;  // elements in float between reading and writing: 2 KB, well inside the first cache
constexpr size_t kLanes = 64;

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline void widen(const float* from, float* to, size_t count) { std::memcpy(to, from, count * sizeof(float)); }
inline void narrow(const float* from, float* to, size_t count) { std::memcpy(to, from, count * sizeof(float)); }

inline void widen(const BF16* from, float* to, size_t count) {
  for (size_t i = 0; i < count; i++) {
    uint32_t bits = uint32_t(from[i].bits) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// To the nearest, ties to even; not-a-number stays one.
inline void narrow(const float* from, BF16* to, size_t count) {
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, from + i, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    to[i].bits = uint16_t((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
  }
}

inline void widen(const F16* from, float* to, size_t count) {
  size_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
#endif
  for (; i < count; i++) {
    _Float16 value;
    std::memcpy(&value, from + i, 2);
    to[i] = float(value);
  }
}

inline void narrow(const float* from, F16* to, size_t count) {
  size_t i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; i++) {
    _Float16 value = _Float16(from[i]);
    std::memcpy(to + i, &value, 2);
  }
}

// Integers wrap, as in PyTorch; in the signed types that would be undefined.
inline float add(float a, float b) { return a + b; }
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

template <typename T, bool kMax>
void combine_narrow(void* out, const void* const* in, int num_in, size_t count) {
  alignas(64) float total[kBlock], part[kBlock];
  for (size_t start = 0; start < count; start += kBlock) {
    size_t size = count - start < kBlock ? count - start : kBlock;
    widen(static_cast<const T*>(in[0]) + start, total, size);
    for (int rank = 1; rank < num_in; rank++) {
      widen(static_cast<const T*>(in[rank]) + start, part, size);
      fold<float, kMax>(total, part, size);
    }
    narrow(total, static_cast<T*>(out) + start, size);
  }
}

template <typename T>
void add_rms_norm(void* normed, void* sum, const void* x, const void* residual, const void* weight, float eps,
                  size_t num_rows, size_t width) {
  alignas(64) float a[kBlock], b[kBlock], lanes[kLanes];
  for (size_t row = 0; row < num_rows; row++) {
    T* sum_row = static_cast<T*>(sum) + row * width;
    std::memset(lanes, 0, sizeof lanes);
    for (size_t start = 0; start < width; start += kBlock) {
      size_t size = width - start < kBlock ? width - start : kBlock;
      widen(static_cast<const T*>(x) + row * width + start, a, size);
      widen(static_cast<const T*>(residual) + row * width + start, b, size);
      for (size_t i = 0; i < size; i++) a[i] += b[i];
      narrow(a, sum_row + start, size);
      widen(sum_row + start, a, size);
      std::memset(a + size, 0, (kBlock - size) * sizeof(float));
      for (size_t i = 0; i < size; i += kLanes) {
        for (size_t lane = 0; lane < kLanes; lane++) lanes[lane] += a[i + lane] * a[i + lane];
      }
    }
    for (size_t half = kLanes / 2; half > 0; half /= 2) {
      for (size_t lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    }
    float scale = 1.0f / __builtin_sqrtf(lanes[0] / float(width) + eps);
    for (size_t start = 0; start < width; start += kBlock) {
      size_t size = width - start < kBlock ? width - start : kBlock;
      widen(sum_row + start, a, size);
      widen(static_cast<const T*>(weight) + start, b, size);
      for (size_t i = 0; i < size; i++) a[i] = a[i] * scale * b[i];
      narrow(a, static_cast<T*>(normed) + row * width + start, size);
    }
  }
}

}  // namespace

#define PHALANX_TEXT_OF(name) #name
#define PHALANX_TEXT(name) PHALANX_TEXT_OF(name)

const Kernels PHALANX_KERNELS = {
    PHALANX_TEXT(PHALANX_SET),
    {combine_narrow<BF16, false>, combine_narrow<F16, false>, combine<float, false>, combine<double, false>,
     combine<int32_t, false>, combine<int64_t, false>, combine<int8_t, false>, combine<uint8_t, false>},
    {combine_narrow<BF16, true>, combine_narrow<F16, true>, combine<float, true>, combine<double, true>,
     combine<int32_t, true>, combine<int64_t, true>, combine<int8_t, true>, combine<uint8_t, true>},
    {add_rms_norm<BF16>, add_rms_norm<F16>, add_rms_norm<float>},
};

}  // namespace phalanx
