// Compiled once for each instruction set; see `reduce_kernels.cpp` for what that asks of a file.
#include "integers.hpp"
#include "quantised_vectors.hpp"

#define PHALANX_JOIN_OF(a, b) a##b
#define PHALANX_JOIN(a, b) PHALANX_JOIN_OF(a, b)

namespace phalanx {
namespace {

// Ints: as many integers as `V` has floats. Quad: four inputs of a row, as they are multiplied. Unsigned: bytes of four
// inputs of each output.
#if defined(__AVX512F__)

using Ints = __m512i;
inline Ints repeat(int32_t value) { return _mm512_set1_epi32(value); }
inline Ints multiply_low(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
inline Ints load_zeros(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline V to_floats(Ints ints) { return _mm512_cvtepi32_ps(ints); }
inline Ints to_nearest(V floats) { return _mm512_cvtps_epi32(floats); }
inline void store_ints(int32_t* to, Ints ints) { _mm512_storeu_si512(to, ints); }

#else

using Ints = __m256i;
inline Ints repeat(int32_t value) { return _mm256_set1_epi32(value); }
inline Ints multiply_low(Ints a, Ints b) { return _mm256_mullo_epi32(a, b); }
inline Ints load_zeros(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
inline V to_floats(Ints ints) { return _mm256_cvtepi32_ps(ints); }
inline Ints to_nearest(V floats) { return _mm256_cvtps_epi32(floats); }
inline void store_ints(int32_t* to, Ints ints) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), ints); }

#endif

#if defined(__AVX512VNNI__)

using Quad = uint32_t;
struct Unsigned { Bits bytes; };
inline Unsigned split(Bits bytes) { return {bytes}; }
inline Ints add_products(Ints sums, const Unsigned& w, Quad x) {
  return _mm512_dpbusd_epi32(sums, w.bytes, _mm512_set1_epi32(int(x)));
}
inline Quad make_quad(const int8_t* x) {
  Quad quad;
  std::memcpy(&quad, x, sizeof quad);
  return quad;
}

#else

// Of bytes 0 and 2, and of 1 and 3, as words: sums of bytes by signed bytes would be cut off at 16 bits.
struct Quad { int32_t even, odd; };
struct Unsigned { Bits even, odd; };
inline Unsigned split(Bits bytes) { return {both(bytes, set_words(0x00FF)), shift_right<8>(bytes)}; }
#if defined(__AVX512F__)
inline Ints add_products(Ints sums, const Unsigned& w, const Quad& x) {
  sums = _mm512_add_epi32(sums, _mm512_madd_epi16(w.even, repeat(x.even)));
  return _mm512_add_epi32(sums, _mm512_madd_epi16(w.odd, repeat(x.odd)));
}
#else
inline Ints add_products(Ints sums, const Unsigned& w, const Quad& x) {
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(w.even, repeat(x.even)));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(w.odd, repeat(x.odd)));
}
#endif
inline int32_t both_words(int8_t low, int8_t high) { return int32_t(uint32_t(uint16_t(low)) | uint32_t(uint16_t(high)) << 16); }
inline Quad make_quad(const int8_t* x) { return {both_words(x[0], x[2]), both_words(x[1], x[3])}; }

#endif

// ---- rows of x ----

// Integers from -127 to 127 as bytes, each eight in the order of `kOrderedInputs`.
inline void order_bytes(int8_t (&to)[kMostInputs], const int32_t (&integers)[kMostInputs]) {
#if defined(__AVX512F__)
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
#pragma GCC unroll 4
  for (size_t i = 0; i < kMostInputs; i += 16) {
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_load_si512(integers + i));
    _mm_store_si128(reinterpret_cast<__m128i*>(to + i), _mm_shuffle_epi8(bytes, order));
  }
#else
  for (size_t i = 0; i < kMostInputs; i++) to[i] = int8_t(integers[i / 8 * 8 + kOrderedInputs[i % 8]]);
#endif
}

// Of so many inputs, at most `kMostInputs`: their integers, filled up with zeros.
struct Quantised {
  float scale;
  int32_t sum;
};
inline Quantised quantise(Quad* out, size_t stride, const uint16_t* x, size_t count) {
  alignas(64) uint16_t held[kMostInputs] = {};
  std::memcpy(held, x, count * sizeof *x);
  uint16_t most = 0;
  for (size_t i = 0; i < kMostInputs; i++) most = std::max<uint16_t>(most, held[i] & 0x7FFF);
  // What is too small to be divided by counts as zero; what is not finite makes a scale that is not, and so the sums.
  const float largest = widen(most);
  const bool finite = most < 0x7F80, usable = largest > 1e-30f && finite;
  const V factor = set_all(usable ? 127.0f / largest : 0.0f);
  alignas(64) int32_t integers[kMostInputs];
#pragma GCC unroll 8
  for (size_t i = 0; i < kMostInputs; i += kWidth) {
    store_ints(integers + i, usable ? to_nearest(times(widen_all(held + i), factor)) : repeat(0));
  }
  int32_t sum = 0;
  for (size_t i = 0; i < kMostInputs; i++) sum += integers[i];
  alignas(64) int8_t bytes[kMostInputs];
  order_bytes(bytes, integers);
  for (size_t quad = 0; quad < (count + 7) / 8 * 2; quad++) out[quad * stride] = make_quad(bytes + 4 * quad);
  return {usable || !finite ? largest / 127.0f : 0.0f, sum};
}

void quantise_rows(const IntegerRows& out, const uint16_t* x, size_t x_stride, size_t num_rows, size_t num_inputs,
                   const QuantisedFormat& format) {
  const int32_t less = format.zeros ? 1 : format.bits == 8 ? 128 : format.offsets ? 0 : 8;
  for (size_t row = 0; row < num_rows; row++, x += x_stride) {
    Quad* quads = static_cast<Quad*>(out.quads) + row;
    size_t at = row;
    for (size_t first = 0; first < num_inputs; first += format.group_size) {
      const size_t end = std::min(num_inputs, first + format.group_size);
      for (size_t k = first; k < end; k += format.input_group, at += num_rows) {
        const size_t count = std::min(format.input_group, end - k);
        const Quantised found = quantise(quads, num_rows, x + k, count);
        out.scales[at] = found.scale;
        out.sums[at] = found.scale * float(found.sum);
        out.starts[at] = -less * found.sum;
        quads += (count + 7) / 8 * 2 * num_rows;
      }
    }
  }
}

// ---- products ----

template <size_t kRows>
inline void add_quad(Ints (&sums)[kRows][kVectors], const Unsigned (&w)[kVectors], const Quad* x) {
#pragma GCC unroll 16
  for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) sums[row][v] = add_products(sums[row][v], w[v], x[row]);
  }
}

// Eight inputs against all rows.
template <size_t kRows>
struct ByteQuads {
  static constexpr size_t kBytes = 8 * kBlockColumns;
  static void multiply(Ints (&sums)[kRows][kVectors], const Quad* x, const uint8_t* octet, size_t column) {
#pragma GCC unroll 2
    for (size_t quad = 0; quad < 2; quad++) {
      Unsigned w[kVectors];
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) w[v] = split(load_bits(octet + 128 * quad + 64 * v + 4 * column));
      add_quad<kRows>(sums, w, x + quad * kRows);
    }
  }
};

template <size_t kRows>
struct NibbleQuads {
  static constexpr size_t kBytes = 4 * kBlockColumns;
  static void multiply(Ints (&sums)[kRows][kVectors], const Quad* x, const uint8_t* octet, size_t column) {
    Bits held[kVectors];
    Unsigned w[kVectors];
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) {
      held[v] = load_bits(octet + 64 * v + 4 * column);
      w[v] = split(both(held[v], set_bytes(0x0F)));
    }
    add_quad<kRows>(sums, w, x);
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) w[v] = split(both(shift_right<4>(held[v]), set_bytes(0x0F)));
    add_quad<kRows>(sums, w, x + kRows);
  }
};

// Of some octets of a group. A function of its own, or else the compiler keeps sums in memory.
template <class Held, size_t kRows>
[[gnu::noinline]] void add_up(Ints (&out)[kRows][kVectors], const int32_t* starts, const uint8_t* zeros, const Quad* x,
                              const uint8_t* w, size_t octets, size_t column, size_t ahead_bytes) {
  Ints sums[kRows][kVectors];
#pragma GCC unroll 4
  for (size_t v = 0; v < kVectors; v++) {
    const Ints times = zeros == nullptr ? repeat(1) : load_zeros(zeros + v * kHalf);
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) sums[row][v] = multiply_low(times, repeat(starts[row]));
  }
  for (size_t octet = 0; octet < octets; octet++) {
    if (column == 0) prefetch<Held::kBytes, _MM_HINT_T0>(w + ahead_bytes);
    Held::multiply(sums, x, w, column);
    x += 2 * kRows;
    w += Held::kBytes;
  }
#pragma GCC unroll 16
  for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; v++) out[row][v] = sums[row][v];
  }
}

// The sums of a group to those of the whole, `kBlockColumns` a row.
template <size_t kRows, bool kOffsets>
[[gnu::noinline]] void add_scaled(float* sums, const Ints (&of_group)[kRows][kVectors], const IntegerRows& x, size_t at,
                                  const QuantisedFormat& format, const uint8_t* head, size_t column) {
#pragma GCC unroll 4
  for (size_t v = 0; v < kVectors; v++) {
    const V scale = load_scales(head, column + v * kHalf, format.scales);
    const V offset = kOffsets ? load_scales(head + format.scale_bytes(), column + v * kHalf, format.scales) : zero();
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
      float* const sum = sums + row * kBlockColumns + v * kHalf;
      V total = load(sum);
      if (kOffsets) total = multiply_add(offset, set_all(x.sums[at + row]), total);
      store(sum, multiply_add(to_floats(of_group[row][v]), times(scale, set_all(x.scales[at + row])), total));
    }
  }
}

template <template <size_t> class Octet, size_t kRows>
void multiply(const IntegerTile& tile) {
  using Held = Octet<kRows>;
  alignas(64) float sums[kRows * kBlockColumns] = {};
  const QuantisedFormat& format = *tile.format;
  const size_t octets_a_group = format.group_size / 8;
  for (size_t row = 0; row < kRows; row++) __builtin_prefetch(tile.y + row * tile.y_stride, 1);
  for (size_t column = 0; column < kHalf; column += kWidth) {
    const Quad* x = static_cast<const Quad*>(tile.x.quads);
    size_t at = 0;
    const uint8_t* w = tile.w;
    for (size_t left = tile.num_octets; left > 0;) {
      size_t in_group = std::min(left, octets_a_group);
      left -= in_group;
      const uint8_t* const head = w;
      const uint8_t* const zeros = format.zeros ? head + format.zeros_at() + column : nullptr;
      w += format.group_head();
      for (; in_group > 0; at += kRows) {
        const size_t octets = std::min(in_group, format.input_group / 8);
        in_group -= octets;
        Ints of_group[kRows][kVectors];
        add_up<Held, kRows>(of_group, tile.x.starts + at, zeros, x, w, octets, column, tile.ahead_bytes);
        x += octets * 2 * kRows;
        w += octets * Held::kBytes;
        const auto scale_up = format.offsets ? add_scaled<kRows, true> : add_scaled<kRows, false>;
        scale_up(sums + column, of_group, tile.x, at, format, head, column);
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
const IntegerKernels PHALANX_JOIN(kIntegers_, PHALANX_SET) = {sizeof(Quad), quantise_rows, PHALANX_ROWS(ByteQuads),
                                                              PHALANX_ROWS(NibbleQuads)};

}  // namespace phalanx
