// Compiled once for each instruction set; see `reduce_kernels.cpp` for what that asks of a file.
#include <type_traits>

#include "quantised_vectors.hpp"

#define PHALANX_JOIN_OF(a, b) a##b
#define PHALANX_JOIN(a, b) PHALANX_JOIN_OF(a, b)

namespace phalanx {
namespace {

#if defined(__AVX512F__)

#if defined(__AVX512BF16__)

// The two bytes of the bfloat16 of each number up to 127.
struct Table {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
  constexpr Table() {
    for (int value = 1; value < 128; value++) {
      int exponent = 0;
      while (value >> (exponent + 1)) exponent++;
      const int bits = (127 + exponent) << 7 | ((value << (7 - exponent)) & 0x7F);
      high[value] = uint8_t(bits >> 8);
      low[value] = uint8_t(bits & 0xFF);
    }
  }
};
constexpr Table kTable;

struct Bytes {
  static constexpr bool kCoded = true;
  __m512i high0 = _mm512_load_si512(kTable.high), high1 = _mm512_load_si512(kTable.high + 64);
  __m512i low0 = _mm512_load_si512(kTable.low), low1 = _mm512_load_si512(kTable.low + 64);
  void load(W (&w)[kVectors], const uint8_t* from, uint8_t*, size_t column) const {
    const Bits bytes = load_bits(from + 4 * column), sizes = _mm512_abs_epi8(bytes);
    Bits upper = _mm512_permutex2var_epi8(high0, sizes, high1);
    const Bits lower = _mm512_permutex2var_epi8(low0, sizes, low1);
    upper = _mm512_mask_mov_epi8(upper, _mm512_movepi8_mask(sizes), _mm512_set1_epi8(0x43));  // -128
    upper = masked_or(bytes, set_bytes(0x80), upper);
    w[0] = widen(interleave_first(lower, upper));
    w[1] = widen(interleave_last(lower, upper));
  }
};

// The two bytes of the bfloat16 of each positive E4M3 number: eight times its part below 2^exponent is an integer, but
// for the last, which is none.
struct E4M3Table {
  alignas(64) uint8_t high[128] = {}, low[128] = {};
  constexpr E4M3Table() {
    for (int code = 1; code < 128; code++) {
      int eighths = code < 8 ? code : 8 + code % 8, exponent = code < 8 ? 1 - 7 : code / 8 - 7;
      while (eighths < 8) eighths *= 2, exponent--;
      const int bits = code == 127 ? 0x7FC0 : (127 + exponent) << 7 | (eighths - 8) << 4;
      high[code] = uint8_t(bits >> 8);
      low[code] = uint8_t(bits & 0xFF);
    }
  }
};
constexpr E4M3Table kE4M3Table;

struct E4M3Bytes {
  static constexpr bool kCoded = true;
  __m512i high0 = _mm512_load_si512(kE4M3Table.high), high1 = _mm512_load_si512(kE4M3Table.high + 64);
  __m512i low0 = _mm512_load_si512(kE4M3Table.low), low1 = _mm512_load_si512(kE4M3Table.low + 64);
  void load(W (&w)[kVectors], const uint8_t* from, uint8_t*, size_t column) const {
    const Bits bytes = load_bits(from + 4 * column);  // whose signs the tables do not see
    const Bits upper = masked_or(bytes, set_bytes(0x80), _mm512_permutex2var_epi8(high0, bytes, high1));
    const Bits lower = _mm512_permutex2var_epi8(low0, bytes, low1);
    w[0] = widen(interleave_first(lower, upper));
    w[1] = widen(interleave_last(lower, upper));
  }
};

// Puts them where other rows find them decoded: [pairs][32][2] bfloat16.
template <class Coded>
struct Kept : Coded {
  void load(W (&w)[kVectors], const uint8_t* from, uint8_t* decoded, size_t column) const {
    Coded::load(w, from, nullptr, column);
    store_bits(decoded, (Bits)w[0].both);
    store_bits(decoded + 64, (Bits)w[1].both);
  }
};

struct Decoded {
  static constexpr bool kCoded = false;
  void load(W (&w)[kVectors], const uint8_t*, const uint8_t* decoded, size_t) const {
    w[0] = widen(load_bits(decoded));
    w[1] = widen(load_bits(decoded + 64));
  }
};

#else

inline W signed_words(Bits words) {
  return {_mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16)),
          _mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16))};
}
inline Bits signed_bytes(Bits words) { return _mm512_srai_epi16(words, 8); }
inline Bits no_bits() { return _mm512_setzero_si512(); }

#endif

#else

inline W signed_words(Bits words) {
  return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(words, 16), 16)),
          _mm256_cvtepi32_ps(_mm256_srai_epi32(words, 16))};
}
inline Bits signed_bytes(Bits words) { return _mm256_srai_epi16(words, 8); }
inline Bits no_bits() { return _mm256_setzero_si256(); }

#endif

#if !defined(__AVX512BF16__)
struct Bytes {
  static constexpr bool kCoded = true;
  void load(W (&w)[kVectors], const uint8_t* from, uint8_t*, size_t column) const {
    const Bits bytes = load_bits(from + 4 * column);
    w[0] = signed_words(signed_bytes(interleave_first(bytes, bytes)));
    w[1] = signed_words(signed_bytes(interleave_last(bytes, bytes)));
  }
};

// As if exponents were those of bfloat16, then 2^120 times that.
struct E4M3Bytes {
  static constexpr bool kCoded = true;
  const Bits sign = set_words(0x8000), size = set_words(0x07F0);
  const V power = set_all(0x1p120f);
  W widened(Bits words) const {
    W w = widen(masked_or(shift_right<4>(words), size, both(words, sign)));
    w.even = times(w.even, power);
    w.odd = times(w.odd, power);
    return w;
  }
  void load(W (&w)[kVectors], const uint8_t* from, uint8_t*, size_t column) const {
    const Bits bytes = load_bits(from + 4 * column);
    w[0] = widened(interleave_first(no_bits(), bytes));
    w[1] = widened(interleave_last(no_bits(), bytes));
  }
};
#endif

// Eight inputs against all rows, whose weights are read as `Source` says.
template <size_t kRows, class Source>
struct ByteOctet : Source {
  static constexpr size_t kBytes = 8 * kBlockColumns;
  static constexpr float kTooMuch = 0;
  void multiply(V (&sums)[kRows][kVectors], const Pair* x, const uint8_t* octet, uint8_t* decoded, size_t column) const {
#pragma GCC unroll 4
    for (size_t pair = 0; pair < 4; pair++) {
      W w[kVectors];
      this->load(w, octet + 64 * pair, decoded + 128 * pair, column);
      add_products(sums, w, x + pair * kRows);
    }
  }
  static void add_products(V (&sums)[kRows][kVectors], const W (&w)[kVectors], const Pair* x) {
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) sums[row][v] = add_product(sums[row][v], w[v], x[row]);
    }
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) hold(sums[row][v]);
    }
  }
};

// Four bits below the exponent of 128 make 128 and so much more, which is taken from the sums again.
template <size_t kRows>
struct NibbleOctet {
  static constexpr size_t kBytes = 4 * kBlockColumns;
  static constexpr float kTooMuch = 128;
  static constexpr bool kCoded = true;
  const Bits mask = set_words(0x000F), exponent = set_words(0x4300);
  template <size_t kPair>
  void multiply_pair(V (&sums)[kRows][kVectors], const Pair* x, const Bits (&held)[kVectors]) const {
    W w[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) w[v] = widen(masked_or(shift_right<4 * kPair>(held[v]), mask, exponent));
    ByteOctet<kRows, Bytes>::add_products(sums, w, x + kPair * kRows);
  }
  void multiply(V (&sums)[kRows][kVectors], const Pair* x, const uint8_t* octet, uint8_t*, size_t column) const {
    Bits held[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) held[v] = load_bits(octet + 64 * v + 4 * column);
    multiply_pair<0>(sums, x, held);
    multiply_pair<1>(sums, x, held);
    multiply_pair<2>(sums, x, held);
    multiply_pair<3>(sums, x, held);
  }
};

template <size_t kRows>
using ByBytes = ByteOctet<kRows, Bytes>;
template <size_t kRows>
using ByE4M3 = ByteOctet<kRows, E4M3Bytes>;
#if defined(__AVX512BF16__)
template <size_t kRows>
using ByKeptBytes = ByteOctet<kRows, Kept<Bytes>>;
template <size_t kRows>
using ByKeptE4M3 = ByteOctet<kRows, Kept<E4M3Bytes>>;
template <size_t kRows>
using ByDecoded = ByteOctet<kRows, Decoded>;
#endif

template <template <size_t> class Octet, size_t kRows>
void multiply(const QuantisedTile& tile) {
  using Held = Octet<kRows>;
  alignas(64) float sums[kRows * kBlockColumns];
  const QuantisedFormat& format = *tile.format;
  const size_t octets_a_group = format.group_size / 8, scale_bytes = format.scale_bytes();
  const float too_much = Held::kTooMuch == 0 ? 0 : format.unsigned_nibbles() ? Held::kTooMuch : Held::kTooMuch + 8;
  const float zeros_off = Held::kTooMuch == 0 ? -128 : Held::kTooMuch;
  for (size_t row = 0; row < kRows; row++) __builtin_prefetch(tile.y + row * tile.y_stride, 1);
  for (size_t column = 0; column < kHalf; column += kWidth) {
    const Held held{};
    const Pair* x = static_cast<const Pair*>(tile.x);
    const float* x_sums = tile.x_sums;
    const uint8_t* w = tile.w;
    uint8_t* decoded = tile.decoded;
    for (size_t left = tile.num_octets; left > 0; x_sums += kRows) {
      const size_t octets = left < octets_a_group ? left : octets_a_group;
      const bool first = left == tile.num_octets;
      left -= octets;
      const uint8_t* const scales = w;
      w += format.group_head();
      V of_group[kRows][kVectors];
      if (format.zeros) {
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; v++) {
          const V off = add(widen_bytes(scales + format.zeros_at() + column + v * kHalf), set_all(zeros_off));
#pragma GCC unroll 16
          for (size_t row = 0; row < kRows; row++) of_group[row][v] = times(off, set_all(-x_sums[row]));
        }
      } else {
#pragma GCC unroll 16
        for (size_t row = 0; row < kRows; row++) {
          const V begin = Held::kTooMuch == 0 ? zero() : set_all(-too_much * x_sums[row]);
#pragma GCC unroll 4
          for (size_t v = 0; v < kVectors; v++) of_group[row][v] = begin;
        }
      }
      for (size_t octet = 0; octet < octets; octet++) {
        if (Held::kCoded && column == 0) prefetch<Held::kBytes, _MM_HINT_T0>(w + tile.ahead_bytes);
        held.multiply(of_group, x, w, decoded, column);
        x += 4 * kRows;
        w += Held::kBytes;
        decoded += kDecodedOctetBytes;
      }
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) {
        const size_t output = column + v * kHalf;
        const V scale = load_scales(scales, output, format.scales);
        const V offset = format.offsets ? load_scales(scales + scale_bytes, output, format.scales) : zero();
#pragma GCC unroll 16
        for (size_t row = 0; row < kRows; row++) {
          float* const sum = sums + row * kBlockColumns + output;
          V total = multiply_add(of_group[row][v], scale, first ? zero() : load(sum));
          if (format.offsets) total = multiply_add(offset, set_all(x_sums[row]), total);
          store(sum, total);
        }
      }
    }
  }
  store_rows<kRows>(tile.y, tile.y_stride, tile.num_columns, tile.bias, sums);
}

}  // namespace

#if defined(__AVX512F__)
#define PHALANX_ROWS(octet)                                                                                   \
  {nullptr, multiply<octet, 1>, multiply<octet, 2>, multiply<octet, 3>, multiply<octet, 4>, multiply<octet, 5>, \
   multiply<octet, 6>, multiply<octet, 7>, multiply<octet, 8>, multiply<octet, 9>, multiply<octet, 10>,         \
   multiply<octet, 11>, multiply<octet, 12>}
#else
#define PHALANX_ROWS(octet) {nullptr, multiply<octet, 1>, multiply<octet, 2>, multiply<octet, 3>, multiply<octet, 4>}
#endif

extern const IntegerKernels PHALANX_JOIN(kIntegers_, PHALANX_SET);
extern const QuantisedKernels PHALANX_JOIN(kQuantised_, PHALANX_SET);
const QuantisedKernels PHALANX_JOIN(kQuantised_, PHALANX_SET) = {
    PHALANX_ROWS(ByBytes),
    PHALANX_ROWS(NibbleOctet),
    PHALANX_ROWS(ByE4M3),
#if defined(__AVX512BF16__)
    PHALANX_ROWS(ByKeptBytes),
    PHALANX_ROWS(ByKeptE4M3),
    PHALANX_ROWS(ByDecoded),
#else
    {},
    {},
    {},
#endif
    &PHALANX_JOIN(kIntegers_, PHALANX_SET),
};

}  // namespace phalanx
