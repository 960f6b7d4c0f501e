// The small matrix products of attention, and the packing of what they read. Part of `operator_kernels.cpp`, compiled
// once for each instruction set.
//
// A unit is what one step multiplies: a float, or with AVX-512's bfloat16 a pair of them, added up in one instruction.
// Each number of a result is a sum in the order of its steps, however many rows and columns are computed beside it.
#pragma once
#include "operators.hpp"
#include "pages.hpp"

namespace phalanx {
namespace {

struct BF16Pair {
  BF16 first, second;
};

inline V unit_of(float a) { return all(a); }
inline V units_of(const float* b) { return load(b); }
inline V multiply_add(V sum, V a, V b) { return madd(a, b, sum); }

#if defined(__AVX512BF16__)
inline __m512bh unit_of(BF16Pair a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(int(bits));
}
inline __m512bh units_of(const BF16Pair* b) { return (__m512bh)_mm512_loadu_si512(b); }
inline V multiply_add(V sum, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sum, a, b); }
#endif

// c [kRows, kColumns * kWidth] = c * factor + a [kRows, num_steps] b [num_steps, kColumns * kWidth], c from zero where
// there are no factors, which are one a row.
template <typename U, int kRows, int kColumns>
inline void product(const U* a, size_t a_stride, const U* b, size_t b_stride, size_t num_steps, float* c,
                    size_t c_stride, const float* factors) {
  V sums[kRows][kColumns];
  for (int row = 0; row < kRows; row++) {
    for (int column = 0; column < kColumns; column++) {
      sums[row][column] = factors == nullptr
                              ? all(0)
                              : multiply(load(c + size_t(row) * c_stride + size_t(column) * kWidth), all(factors[row]));
    }
  }
  for (size_t step = 0; step < num_steps; step++) {
    decltype(units_of(b)) columns[kColumns];
    for (int column = 0; column < kColumns; column++) {
      columns[column] = units_of(b + step * b_stride + size_t(column) * kWidth);
    }
    for (int row = 0; row < kRows; row++) {
      const auto unit = unit_of(a[size_t(row) * a_stride + step]);
      for (int column = 0; column < kColumns; column++) {
        sums[row][column] = multiply_add(sums[row][column], unit, columns[column]);
      }
    }
  }
  for (int row = 0; row < kRows; row++) {
    for (int column = 0; column < kColumns; column++) {
      store(c + size_t(row) * c_stride + size_t(column) * kWidth, sums[row][column]);
    }
  }
}

// As many sums as the registers hold beside a row of b and one of a.
#if defined(__AVX512F__)
constexpr int kTileRows = 6, kTileColumns = 4;
#elif defined(__AVX2__)
constexpr int kTileRows = 6, kTileColumns = 2;
#else
constexpr int kTileRows = 2, kTileColumns = 4;
#endif

template <typename U, int kColumns>
inline void product_rows(const U* a, size_t a_stride, const U* b, size_t b_stride, size_t num_steps, float* c,
                         size_t c_stride, const float* factors, size_t num_rows) {
  size_t row = 0;
  auto advance = [&](auto rows) {
    product<U, rows.value, kColumns>(a + row * a_stride, a_stride, b, b_stride, num_steps, c + row * c_stride, c_stride,
                                     factors == nullptr ? nullptr : factors + row);
    row += rows.value;
  };
  while (row + kTileRows <= num_rows) advance(std::integral_constant<int, kTileRows>());
  switch (num_rows - row) {
#if defined(__AVX2__)
    case 5: return advance(std::integral_constant<int, 5>());
    case 4: return advance(std::integral_constant<int, 4>());
    case 3: return advance(std::integral_constant<int, 3>());
    case 2: return advance(std::integral_constant<int, 2>());
#endif
    case 1: return advance(std::integral_constant<int, 1>());
  }
}

// c [num_rows, num_columns] = c * factors + a b, num_columns a multiple of kWidth.
template <typename U>
inline void product_all(const U* a, size_t a_stride, const U* b, size_t b_stride, size_t num_steps, float* c,
                        size_t c_stride, const float* factors, size_t num_rows, size_t num_columns) {
  size_t column = 0;
  auto advance = [&](auto columns) {
    product_rows<U, columns.value>(a, a_stride, b + column, b_stride, num_steps, c + column, c_stride, factors, num_rows);
    column += columns.value * kWidth;
  };
  while (column + kTileColumns * kWidth <= num_columns) advance(std::integral_constant<int, kTileColumns>());
  switch ((num_columns - column) / kWidth) {
#if defined(__AVX512F__) || !defined(__AVX2__)
    case 3: return advance(std::integral_constant<int, 3>());
    case 2: return advance(std::integral_constant<int, 2>());
#endif
    case 1: return advance(std::integral_constant<int, 1>());
  }
}

// kWidth registers of 32 bits a lane, turned: lane j of the i-th becomes lane i of the j-th.
#if defined(__AVX512F__)
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
using Lanes = __m512i;
inline Lanes lanes_of(V v) { return _mm512_castps_si512(v); }
inline void put(void* to, Lanes v) { _mm512_storeu_si512(to, v); }
#elif defined(__AVX2__)
inline void transpose(__m256i (&r)[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}
using Lanes = __m256i;
inline Lanes lanes_of(V v) { return _mm256_castps_si256(v); }
inline void put(void* to, Lanes v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }
#else
inline void transpose(float (&)[1]) {}
using Lanes = float;
inline Lanes lanes_of(V v) { return v; }
inline void put(void* to, Lanes v) { std::memcpy(to, &v, sizeof v); }
#endif

// kWidth units from numbers that lie one after another.
template <typename C>
inline Lanes units_from(const float*, const C* from) { return lanes_of(load(from)); }
#if defined(__AVX512BF16__)
template <typename C>
inline Lanes units_from(const BF16Pair*, const C* from) { return numbers_at(from); }
#endif

// Lanes of numbers times a power of two.
inline Lanes lifted(const float*, Lanes lanes, float) { return lanes; }
#if defined(__AVX512BF16__)
inline Lanes lifted(const BF16Pair*, Lanes lanes, float by) {
  BF16 numbers[2 * kWidth];
  put(numbers, lanes);
  Pair pair = load_pair(numbers);
  store_pair(numbers, {multiply(pair.a, all(by)), multiply(pair.b, all(by))});
  return _mm512_loadu_si512(numbers);
}
#endif

// Units of a row of numbers, the last ones padded with zeros: to [units of head_dim, rounded up to kWidth]. L: how they are
// lifted.
template <typename L, typename U, typename T>
inline void pack_row(U* to, const T* from, size_t count) {
  constexpr size_t kNumbers = kWidth * (std::is_same<U, float>::value ? 1 : 2);
  size_t i = 0;
  const auto units = [to](const T* numbers) {
    return L::kBefore == 1 ? units_from(to, numbers) : lifted(to, units_from(to, numbers), L::kBefore);
  };
  for (; i + kNumbers <= count; i += kNumbers, to += kWidth) put(to, units(from + i));
  if (i == count) return;
  T rest[kNumbers] = {};
  std::memcpy(rest, from + i, (count - i) * sizeof(T));
  put(to, units(rest));
}

// Brings rows into the second cache a line at a time, in the order of memory: rows are scattered, so that the processor
// does not foresee them, and of many lines asked for at once it would drop most.
class Fetch {
 public:
  Fetch() = default;
  // places: of num_rows rows of num_bytes, in elements of T from `from`.
  template <typename T>
  Fetch(const T* from, const int64_t* places, size_t num_rows, size_t num_bytes)
      : from_(reinterpret_cast<const char*>(from)), place_(places), last_(places + num_rows), item_(sizeof(T)),
        num_bytes_(num_bytes) {
    start();
  }

  void line() {
    if (place_ == last_) return;
    __builtin_prefetch(line_, 0, 2);
    line_ += 64;
    if (line_ < stop_) return;
    place_++;
    start();
  }
  void rest() {
    while (place_ != last_) line();
  }

 private:
  const char *from_ = nullptr, *line_ = nullptr, *stop_ = nullptr;
  const int64_t *place_ = nullptr, *last_ = nullptr;
  size_t item_ = 0, num_bytes_ = 0;

  void start() {
    if (place_ == last_) return;
    line_ = from_ + *place_ * int64_t(item_);
    stop_ = line_ + num_bytes_;
  }
};

// Of kWidth keys, kWidth units from number `i` on: units[j] that of all keys.
template <typename U, typename T>
inline void turn_keys(Lanes (&units)[kWidth], const T* keys, const int64_t* places, size_t i, size_t head_dim) {
  constexpr size_t kNumbers = kWidth * (std::is_same<U, float>::value ? 1 : 2);
  if (i + kNumbers <= head_dim) {
    for (size_t j = 0; j < kWidth; j++) units[j] = units_from(static_cast<U*>(nullptr), keys + places[j] + i);
  } else {
    for (size_t j = 0; j < kWidth; j++) {
      T rest[kNumbers] = {};
      std::memcpy(rest, keys + places[j] + i, (head_dim - i) * sizeof(T));
      units[j] = units_from(static_cast<U*>(nullptr), rest);
    }
  }
  transpose(units);
}

#if defined(__AVX512BF16__)
// Of kWidth keys, codes[j] the numbers 4 j to 4 j + 3 from number `i` on, the second and the third exchanged: `widened`
// makes units of them.
template <typename C>
inline void turn_codes(Lanes (&codes)[kWidth], const C* keys, const int64_t* places, size_t i) {
  const __m512i exchanged = _mm512_set4_epi32(0x0F0D0E0C, 0x0B090A08, 0x07050604, 0x03010200);
  for (size_t j = 0; j < kWidth; j++) {
    codes[j] = _mm512_shuffle_epi8(_mm512_loadu_si512(keys + places[j] + i), exchanged);
  }
  transpose(codes);
}
#endif

// keys: rows of head_dim at `places`. to [units of head_dim, rounded up to kWidth][kKeys]: for each unit that of all
// keys, up to a multiple of kWidth, for which there are places.
template <size_t kKeys, typename U, typename T>
inline void pack_keys(U* to, const T* keys, const int64_t* places, size_t num_keys, size_t head_dim) {
  constexpr size_t kNumbers = kWidth * (std::is_same<U, float>::value ? 1 : 2);
  for (size_t key = 0; key < num_keys; key += kWidth) {
    for (size_t i = 0; i < head_dim; i += kNumbers) {
      Lanes units[kWidth];
      turn_keys<U>(units, keys, places + key, i, head_dim);
      for (size_t j = 0; j < kWidth; j++) put(to + (i / kNumbers * kWidth + j) * kKeys + key, units[j]);
    }
  }
}

// values: rows of head_dim at `places`. to [units of their number][width]: numbers of the same place of one value, or of two.
template <typename T>
inline void pack_values(float* to, size_t width, const T* values, const int64_t* places, size_t num_values,
                        size_t head_dim) {
  for (size_t value = 0; value < num_values; value++) pack_row<Lift<float>>(to + value * width, values + places[value], head_dim);
}
#if defined(__AVX512BF16__)
// Numbers of two rows in turns: of the first or of the second half of both.
inline Lanes in_turns(__m512i first, __m512i second, bool high) {
  const __m512i places = _mm512_add_epi32(
      _mm512_set1_epi32(high ? 0x00300010 : 0x00200000),
      _mm512_mullo_epi32(_mm512_set1_epi32(0x00010001),
                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
  return _mm512_permutex2var_epi16(first, places, second);
}
template <typename C>
inline void pack_values(BF16Pair* to, size_t width, const C* values, const int64_t* places, size_t num_values,
                        size_t head_dim) {
  for (size_t value = 0; value < num_values; value += 2, to += width) {
    const bool both = value + 1 < num_values;
    const C *one = values + places[value], *other = values + places[both ? value + 1 : value];
    for (size_t i = 0; i < head_dim; i += 2 * kWidth) {
      const __mmask32 there = head_dim - i < 2 * kWidth ? (1u << (head_dim - i)) - 1 : ~0u;
      const __m512i first = numbers_at(one + i, there);
      const __m512i second = numbers_at(other + i, both ? there : 0);
      put(to + i, in_turns(first, second, false));
      if (i + kWidth < width) put(to + i + kWidth, in_turns(first, second, true));
    }
  }
}
#endif

}  // namespace
}  // namespace phalanx
