// The products of attention for few rows, from keys and values where they lie: packing them first, as `tile.hpp` does for
// many rows, takes as long as multiplying. Every number is the same sum in the same order as there, to the bit. Part of
// `operator_kernels.cpp`, compiled once for each instruction set.
#pragma once
#include "tile.hpp"

namespace phalanx {
namespace {

// Rows that are taken so, and numbers that a head must be a multiple of.
constexpr size_t kMostDirectRows = kWidth > 1 ? 8 : 0;
constexpr size_t kDirectStep = 2 * kWidth;

#if defined(__AVX512F__)
inline V units_in(const float*, Lanes lanes) { return _mm512_castsi512_ps(lanes); }
#elif defined(__AVX2__)
inline V units_in(const float*, Lanes lanes) { return _mm256_castsi256_ps(lanes); }
#else
inline V units_in(const float*, Lanes lanes) { return lanes; }
#endif

// kColumns registers of units: those of a value, or of it and the one after it, zeros where there is none.
template <size_t kColumns, typename T>
inline void value_units(V (&units)[kColumns], const float*, const T* value, const T*) {
  for (size_t column = 0; column < kColumns; column++) units[column] = load(value + column * kWidth);
}
#if defined(__AVX512BF16__)
inline __m512bh units_in(const BF16Pair*, Lanes lanes) { return (__m512bh)lanes; }

template <size_t kColumns>
inline void value_units(__m512bh (&units)[kColumns], const BF16Pair*, const I8* value, const I8* after) {
  const auto codes = [](const I8* from) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  };
  for (size_t column = 0; column < kColumns; column++) {
    const __m512i second = after == nullptr ? _mm512_setzero_si512() : codes(after + column * kWidth);
    units[column] = (__m512bh)paired(codes(value + column * kWidth), second);
  }
}
template <size_t kColumns, typename C>
inline void value_units(__m512bh (&units)[kColumns], const BF16Pair*, const C* value, const C* after) {
  for (size_t column = 0; column < kColumns; column += 2) {
    const __m512i first = numbers_at(value + column * kWidth);
    const __m512i second = after == nullptr ? _mm512_setzero_si512() : numbers_at(after + column * kWidth);
    units[column] = (__m512bh)in_turns(first, second, false);
    units[column + 1] = (__m512bh)in_turns(first, second, true);
  }
}
#endif

// scores [kRows, keys, kKeys apart] = queries times keys. queries: units, `stride` a row.
template <size_t kKeys, int kRows, typename U, typename T>
inline void direct_scores(const U* queries, size_t stride, const T* keys, const int64_t* places, size_t num_keys,
                          size_t head_dim, float* scores, Fetch& fetch) {
  constexpr size_t kNumbers = kWidth * (std::is_same<U, float>::value ? 1 : 2);
  for (size_t key = 0; key < num_keys; key += kWidth) {
    V sums[kRows];
    for (V& sum : sums) sum = all(0);
    const U* query = queries;
    size_t i = 0;
#if defined(__AVX512BF16__)
    // Numbers of 8 bits are turned before they are widened, which takes half the steps.
    if constexpr (!std::is_same<U, float>::value && sizeof(T) == 1) {
      for (; i + 2 * kNumbers <= head_dim; i += 2 * kNumbers, query += 2 * kWidth) {
        Lanes codes[kWidth], units[2];
        turn_codes(codes, keys, places + key, i);
#pragma GCC unroll 16
        for (size_t j = 0; j < kWidth; j++) {
          fetch.line();
          widened(keys, codes[j], units[0], units[1]);
          for (size_t half = 0; half < 2; half++) {
#pragma GCC unroll 8
            for (int row = 0; row < kRows; row++) {
              const U* unit = query + size_t(row) * stride + 2 * j + half;
              sums[row] = multiply_add(sums[row], unit_of(*unit), units_in(query, units[half]));
            }
          }
        }
      }
    }
#endif
    for (; i < head_dim; i += kNumbers, query += kWidth) {
      Lanes units[kWidth];
      turn_keys<U>(units, keys, places + key, i, head_dim);
#pragma GCC unroll 16
      for (size_t j = 0; j < kWidth; j++) {
        fetch.line();
#pragma GCC unroll 8
        for (int row = 0; row < kRows; row++) {
          sums[row] = multiply_add(sums[row], unit_of(query[size_t(row) * stride + j]), units_in(query, units[j]));
        }
      }
    }
    for (int row = 0; row < kRows; row++) store(scores + size_t(row) * kKeys + key, sums[row]);
  }
}

// c [kRows, kColumns * kWidth, c_stride apart] = c * factors + weights times the values' numbers from `i` on.
template <int kRows, size_t kColumns, typename U, typename T>
inline void direct_sums(const U* weights, size_t stride, const T* values, const int64_t* places, size_t num_values,
                        float* c, size_t c_stride, const float* factors, Fetch& fetch) {
  constexpr size_t kPerUnit = std::is_same<U, float>::value ? 1 : 2;
  V sums[kRows][kColumns];
  for (int row = 0; row < kRows; row++) {
    for (size_t column = 0; column < kColumns; column++) {
      sums[row][column] = multiply(load(c + size_t(row) * c_stride + column * kWidth), all(factors[row]));
    }
  }
  for (size_t value = 0; value < num_values; value += kPerUnit, weights++) {
    decltype(units_of(weights)) units[kColumns];
    value_units(units, weights, values + places[value],
                value + 1 < num_values ? values + places[value + 1] : nullptr);
#pragma GCC unroll 8
    for (int row = 0; row < kRows; row++) {
      if (size_t(row) < kColumns) fetch.line();
      const auto weight = unit_of(weights[size_t(row) * stride]);
      for (size_t column = 0; column < kColumns; column++) {
        sums[row][column] = multiply_add(sums[row][column], weight, units[column]);
      }
    }
  }
  for (int row = 0; row < kRows; row++) {
    for (size_t column = 0; column < kColumns; column++) {
      store(c + size_t(row) * c_stride + column * kWidth, sums[row][column]);
    }
  }
}

template <int kRows, typename U, typename T>
inline void direct_output(const U* weights, size_t stride, const T* values, const int64_t* places, size_t num_values,
                          size_t head_dim, float* c, size_t c_stride, const float* factors, Fetch& fetch) {
  constexpr size_t kColumns = kTileColumns > 2 && kRows > kTileRows ? 2 : size_t(kTileColumns);
  size_t i = 0;
  for (; i + kColumns * kWidth <= head_dim; i += kColumns * kWidth) {
    direct_sums<kRows, kColumns>(weights, stride, values + i, places, num_values, c + i, c_stride, factors, fetch);
  }
  if (i < head_dim) direct_sums<kRows, 2>(weights, stride, values + i, places, num_values, c + i, c_stride, factors, fetch);
}

// Calls body(std::integral_constant<int, num_rows>).
template <class Body>
inline void with_rows(size_t num_rows, Body&& body) {
  switch (num_rows) {
    case 1: return body(std::integral_constant<int, 1>());
    case 2: return body(std::integral_constant<int, 2>());
    case 3: return body(std::integral_constant<int, 3>());
    case 4: return body(std::integral_constant<int, 4>());
    case 5: return body(std::integral_constant<int, 5>());
    case 6: return body(std::integral_constant<int, 6>());
    case 7: return body(std::integral_constant<int, 7>());
    case 8: return body(std::integral_constant<int, 8>());
  }
}

}  // namespace
}  // namespace phalanx
