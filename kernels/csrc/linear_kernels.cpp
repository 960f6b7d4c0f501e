// Compiled once for each instruction set; see `reduce_kernels.cpp` for what that asks of a file.
#include <cstring>
#include <type_traits>

#include "linear.hpp"
#include "linear_vectors.hpp"
#include "quantised.hpp"

#define PHALANX_JOIN_OF(a, b) a##b
#define PHALANX_JOIN(a, b) PHALANX_JOIN_OF(a, b)
#define PHALANX_TEXT_OF(name) #name
#define PHALANX_TEXT(name) PHALANX_TEXT_OF(name)

namespace phalanx {
namespace {

template <size_t kRows>
void pack(Pair* out, const uint16_t* x, size_t x_stride, size_t num_inputs, size_t num_pairs) {
  const size_t whole = num_inputs / 2;
  for (size_t k = 0; k < whole; k++) {
    for (size_t row = 0; row < kRows; row++) {
      uint16_t both[2];
      std::memcpy(both, x + row * x_stride + 2 * k, sizeof both);
      out[k * kRows + row] = make_pair(both[0], both[1]);
    }
  }
  for (size_t k = whole; k < num_pairs; k++) {
    for (size_t row = 0; row < kRows; row++) {
      out[k * kRows + row] = make_pair(2 * k < num_inputs ? x[row * x_stride + 2 * k] : 0, 0);
    }
  }
}

// Of a plain quad, the bytes of vector v of a pass.
constexpr size_t plain_place(size_t pair, size_t column, size_t v) {
  return kPlainQuadBytes / 2 * pair + 4 * (column + v * kHalf);
}

// How a block's weights are read: pair 0 or 1 of a quad, in one pass over the block.
struct Plain {
  static constexpr size_t kBytes = kPlainQuadBytes;
  explicit Plain(const PackedBlock&) {}
  void load(Bits (&w)[kVectors], const uint8_t* quad, size_t pair, size_t column) const {
    for (size_t v = 0; v < kVectors; v++) w[v] = load_bits(quad + plain_place(pair, column, v));
  }
};

struct Codes {
  static constexpr size_t kBytes = kQuadBytes;
  Bits high, low;
  explicit Codes(const PackedBlock& block) : high(load_table(block.high)), low(load_table(block.low)) {}
  void load(Bits (&w)[kVectors], const uint8_t* quad, size_t pair, size_t column) const {
    const Bits bytes = load_bits(quad + 64 * pair + 4 * column), sign = set_bytes(0x80);
    const Bits codes = both(shift_right(load_bits(quad + 128 + 4 * column), 4 * pair), set_bytes(0x0F));
    const Bits upper = insert(bytes, sign, look_up(high, codes)), lower = insert_others(bytes, sign, look_up(low, codes));
    w[0] = interleave_first(lower, upper);
    w[1] = interleave_last(lower, upper);
  }
};

// Puts them where later rows find them decoded.
struct KeptCodes : Codes {
  using Codes::Codes;
};

template <size_t kRows, bool kOdd>
inline void add_outlier(float* sums, const Pair* x, float weight) {
#pragma GCC unroll 16
  for (size_t row = 0; row < kRows; row++) sums[row * kBlockColumns] += one_of<kOdd>(x[row]) * weight;
}

// The sums of a tile, whole but for outliers and bias, into y.
template <size_t kRows>
void finish(const Tile& tile, float* sums) {
  for (const Outlier& each : tile.block->outliers) {
    const Pair* x = static_cast<const Pair*>(tile.whole_x) + each.input / 2 * kRows;
    if (each.input % 2 == 0) {
      add_outlier<kRows, false>(sums + each.lane, x, widen(each.value));
    } else {
      add_outlier<kRows, true>(sums + each.lane, x, widen(each.value));
    }
  }
  store_rows<kRows>(tile.y, tile.y_stride, tile.num_columns, tile.bias, sums);
}

template <class Held, size_t kRows>
void multiply(const Tile& tile) {
  constexpr bool kKeeps = std::is_same_v<Held, KeptCodes>, kFetches = std::is_same_v<Held, Plain>;
  alignas(64) float whole[kRows * kBlockColumns];
  float* const to = tile.last ? whole : tile.partial;
  if (tile.last) {
    for (size_t row = 0; row < kRows; row++) __builtin_prefetch(tile.y + row * tile.y_stride, 1);
  }
  for (size_t column = 0; column < kHalf; column += kWidth) {
    V sums[kRows][kVectors];
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) {
        sums[row][v] = tile.first ? zero() : load(tile.partial + row * kBlockColumns + column + v * kHalf);
      }
    }
    const Held held(*tile.block);
    const Pair* x = static_cast<const Pair*>(tile.x);
    const uint8_t* w = tile.w;
    uint8_t* decoded = tile.decoded;
    const uint8_t* next = tile.next;
    const size_t num_quads = tile.num_quads, ahead_bytes = tile.ahead_bytes, next_step = tile.next_step;
    for (size_t quad = 0; quad < num_quads; quad++) {
      if (column == 0) prefetch<Held::kBytes, _MM_HINT_T0>(w + ahead_bytes);
      if (kFetches && column == 0) {
        prefetch<kNextBytes, _MM_HINT_T1>(next);  // past the first cache, which x fills
        next += next_step;
      }
#pragma GCC unroll 2
      for (size_t pair = 0; pair < 2; pair++) {
        Bits bits[kVectors];
        held.load(bits, w, pair, column);
        if constexpr (kKeeps) {
          for (size_t v = 0; v < kVectors; v++) store_bits(decoded + plain_place(pair, column, v), bits[v]);
        }
        W pairs[kVectors];
#pragma GCC unroll 4
        for (size_t v = 0; v < kVectors; v++) pairs[v] = widen(bits[v]);
#pragma GCC unroll 16
        for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
          for (size_t v = 0; v < kVectors; v++) sums[row][v] = add_product(sums[row][v], pairs[v], x[row]);
        }
#pragma GCC unroll 16
        for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
          for (size_t v = 0; v < kVectors; v++) hold(sums[row][v]);
        }
        x += kRows;
      }
      w += Held::kBytes;
      if constexpr (kKeeps) decoded += kPlainQuadBytes;
    }
#pragma GCC unroll 16
    for (size_t row = 0; row < kRows; row++) {
#pragma GCC unroll 4
      for (size_t v = 0; v < kVectors; v++) store(to + row * kBlockColumns + column + v * kHalf, sums[row][v]);
    }
  }
  if (tile.last) finish<kRows>(tile, whole);
}

using Pack = void (*)(Pair*, const uint16_t*, size_t, size_t, size_t);
constexpr Pack kPacks[] = {nullptr,  pack<1>, pack<2>, pack<3>,
#if defined(__AVX512F__)
                           pack<4>,  pack<5>, pack<6>, pack<7>, pack<8>, pack<9>, pack<10>, pack<11>, pack<12>};
#else
                           pack<4>};
#endif

void pack_rows(void* out, const uint16_t* x, size_t x_stride, size_t num_rows, size_t num_inputs, size_t num_pairs) {
  kPacks[num_rows](static_cast<Pair*>(out), x, x_stride, num_inputs, num_pairs);
}

}  // namespace

extern const QuantisedKernels PHALANX_JOIN(kQuantised_, PHALANX_SET);
extern const LinearKernels PHALANX_JOIN(kLinear_, PHALANX_SET);
const LinearKernels PHALANX_JOIN(kLinear_, PHALANX_SET) = {
    PHALANX_TEXT(PHALANX_SET),
    kMostRows,
    sizeof(Pair),
    pack_rows,
    {nullptr, multiply<Codes, 1>, multiply<Codes, 2>, multiply<Codes, 3>, multiply<Codes, 4>,
#if defined(__AVX512F__)
     multiply<Codes, 5>, multiply<Codes, 6>, multiply<Codes, 7>, multiply<Codes, 8>,
     multiply<Codes, 9>, multiply<Codes, 10>, multiply<Codes, 11>, multiply<Codes, 12>,
#endif
    },
    {nullptr, multiply<KeptCodes, 1>, multiply<KeptCodes, 2>, multiply<KeptCodes, 3>, multiply<KeptCodes, 4>,
#if defined(__AVX512F__)
     multiply<KeptCodes, 5>, multiply<KeptCodes, 6>, multiply<KeptCodes, 7>, multiply<KeptCodes, 8>,
     multiply<KeptCodes, 9>, multiply<KeptCodes, 10>, multiply<KeptCodes, 11>, multiply<KeptCodes, 12>,
#endif
    },
    {nullptr, multiply<Plain, 1>, multiply<Plain, 2>, multiply<Plain, 3>, multiply<Plain, 4>,
#if defined(__AVX512F__)
     multiply<Plain, 5>, multiply<Plain, 6>, multiply<Plain, 7>, multiply<Plain, 8>,
     multiply<Plain, 9>, multiply<Plain, 10>, multiply<Plain, 11>, multiply<Plain, 12>,
#endif
    },
    &PHALANX_JOIN(kQuantised_, PHALANX_SET),
};

}  // namespace phalanx
