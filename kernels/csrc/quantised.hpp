// A matrix [N, K] of integers of 8 or 4 bits, or of FP8 (E4M3) numbers, with a scale for each output, or for each group
// of its inputs, and the product by it:
//
//   y = x W^T + b,   W[n, k] = scale[n, g] * (q[n, k] - zero[n, g]) + offset[n, g],   g = k / group_size
//
// x, y and b in bfloat16; what is multiplied is exact: an integer or E4M3 number is a bfloat16, and sums are in float,
// scaled once a group. An output is added up over the inputs of a group in their order, then over the groups, in every
// path: it does not depend on the other rows of a product, nor on the number of threads.
//
// The inputs may be held in another order than a row of x has them, some of them as nothing but room: `order` says which
// of x belongs to each, or -1.
//
// A block of 32 outputs lies in one stream, group by group:
//
//   [32 scales] [32 offsets, where there are any] [32 zeros, one byte each, likewise] [octets: of eight inputs each]
//
// An octet of 8 bits is four times 64 bytes, of two inputs each, in the order of `place_of`. One of 4 bits is twice 64
// bytes: a word of 16 bits holds one output's inputs 0, 2, 4, 6 from the lowest bits on, the word after it 1, 3, 5, 7.
// Outputs and inputs are filled up with what multiplies to zero: x has zeros there.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "integers.hpp"
#include "linear.hpp"
#include "packed.hpp"

namespace phalanx {

enum ScaleType : int { kFloatScales, kHalfScales, kBF16Scales };
enum NumberType : int { kIntegers, kE4M3 };  // of 8 bits either

constexpr size_t kDecodedOctetBytes = 8 * kBlockColumns * sizeof(uint16_t);

struct QuantisedFormat {
  size_t bits;        // 8, of -128..127, or 4: of 0..15 with offsets or zeros, else of -8..7
  size_t group_size;  // a multiple of 8; the last group of a row may be shorter
  ScaleType scales;
  bool offsets;
  bool zeros;         // 0..255; of 8 bits 128 more than what is subtracted
  NumberType numbers;
  size_t input_group;  // of x, where it is quantised too, see `integers.hpp`, a multiple of 8; else 0. Of integers only

  size_t octet_bytes() const { return bits * kBlockColumns; }
  size_t scale_bytes() const { return (scales == kFloatScales ? 4 : 2) * kBlockColumns; }
  size_t zeros_at() const { return scale_bytes() * (offsets ? 2 : 1); }
  size_t group_head() const { return zeros_at() + (zeros ? kBlockColumns : 0); }
  bool unsigned_nibbles() const { return offsets || zeros; }
  bool needs_sums() const { return bits == 4 || offsets || zeros; }
  // Of a row of x that is quantised, that share a scale.
  size_t num_input_groups(size_t num_inputs) const {
    const auto of = [this](size_t inputs) { return (inputs + input_group - 1) / input_group; };
    return num_inputs / group_size * of(group_size) + of(num_inputs % group_size);
  }
};

/// Some rows of x against one block of weights.
struct QuantisedTile {
  const void* x;          // [4 octets][num_rows] pairs, as `LinearKernels::pack_rows` leaves them
  const float* x_sums;    // [groups][num_rows]: of a group's inputs
  const uint8_t* w;       // of the block
  uint8_t* decoded;       // [octets][kDecodedOctetBytes], where weights are kept decoded
  const QuantisedFormat* format;
  size_t num_octets;
  size_t ahead_bytes;     // how far before its use w is fetched
  uint16_t* y;            // row stride y_stride
  size_t y_stride;
  size_t num_columns;     // of the block that y has
  const uint16_t* bias;   // of these columns, or null
};

struct QuantisedKernels {
  void (*multiply_bytes[16])(const QuantisedTile& tile);    // by number of rows, up to `LinearKernels::most_rows`
  void (*multiply_nibbles[16])(const QuantisedTile& tile);
  void (*multiply_e4m3[16])(const QuantisedTile& tile);
  // Of 8 bits: those which are put down decoded for other rows, and these; none where that takes as long as decoding.
  void (*multiply_kept_bytes[16])(const QuantisedTile& tile);
  void (*multiply_kept_e4m3[16])(const QuantisedTile& tile);
  void (*multiply_decoded[16])(const QuantisedTile& tile);
  const IntegerKernels* integers;
};

class QuantisedMatrix {
 public:
  static size_t room_bytes(size_t num_outputs, size_t num_inputs, const QuantisedFormat& format);

  /// To be filled by `put`. room: `room_bytes`, from a cache line on, zeros. order: of `num_inputs`, each below
  /// `x_inputs` or -1; empty for inputs that are held as x has them.
  QuantisedMatrix(size_t num_outputs, size_t num_inputs, const QuantisedFormat& format, uint8_t* room, size_t x_inputs,
                  std::vector<int32_t> order);

  /// Rows [first, first + num_rows). q [num_rows, num_inputs]; scales, offsets [num_rows, groups], of the format's type;
  /// zeros [num_rows, groups].
  void put(const int8_t* q, const void* scales, const void* offsets, const uint8_t* zeros, size_t first, size_t num_rows);

  /// out [count, x_inputs], bfloat16 = the rows that `indices` names, of a matrix that begins with row `first` of a
  /// larger one; zeros for rows that it has not.
  void take_held_rows(uint16_t* out, const int64_t* indices, size_t count, int64_t first) const;

  size_t num_outputs() const { return num_outputs_; }
  size_t num_inputs() const { return num_inputs_; }
  size_t x_inputs() const { return x_inputs_; }
  const std::vector<int32_t>& order() const { return order_; }
  size_t num_octets() const { return divide_up(num_inputs_, 8); }
  size_t num_groups() const { return divide_up(num_inputs_, format_.group_size); }
  size_t num_blocks() const { return divide_up(num_outputs_, kBlockColumns); }
  size_t num_bytes() const { return num_blocks() * block_bytes_; }
  const QuantisedFormat& format() const { return format_; }
  const uint8_t* block(size_t index) const { return room_ + index * block_bytes_; }

 private:
  const size_t num_outputs_, num_inputs_;
  const QuantisedFormat format_;
  uint8_t* const room_;
  const size_t block_bytes_;
  const size_t x_inputs_;
  const std::vector<int32_t> order_;

  static size_t divide_up(size_t total, size_t by) { return (total + by - 1) / by; }
  size_t group_start(size_t group) const;  // in the block
  void take_row(uint16_t* out, size_t row) const;
};

/// y [num_rows, outputs] = x [num_rows, x_inputs] W^T + bias [outputs] (or null), of these outputs of W, by the functions
/// of `usable_linears()[instructions]`. x_stride: elements between rows of x. Over the threads of the pool.
void quantised_linear(size_t instructions, uint16_t* y, const uint16_t* x, size_t x_stride, const QuantisedMatrix& weight,
                      const Outputs& outputs, const uint16_t* bias, size_t num_rows);

}  // namespace phalanx
