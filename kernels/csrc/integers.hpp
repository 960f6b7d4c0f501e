// y = x W^T + b where the rows of x are quantised as well, as they come: products of integers.
//
// Of a row, `input_group` inputs of a group of the weight share a scale, a 127th of the largest magnitude; each is the
// nearest multiple, ties to even. With x = s q and W = t (u - less) + o, u without sign, an output is the sum over these
// groups of
//
//   (t s) (sum of u q - less * sum of q) + o (s * sum of q)
//
// of which the sums in brackets are exact. It does not depend on the other rows of a product, nor on the number of
// threads, nor on the set of instructions.
#pragma once
#include <cstddef>
#include <cstdint>

namespace phalanx {

struct LinearKernels;
struct Outputs;
struct QuantisedFormat;
class QuantisedMatrix;

constexpr size_t kMostInputs = 64;  // that share a scale

/// Where each of eight inputs lies: four of them are multiplied in one instruction. 4 bits of an octet lie in this order
/// as they are, and 8 bits, with the sign bit turned round, in twice 128 bytes of four inputs each.
constexpr size_t kOrderedInputs[8] = {0, 4, 1, 5, 2, 6, 3, 7};

/// Some rows of x, quantised. num_groups: of `input_group` inputs or what is left of a group of the weight.
struct IntegerRows {
  void* quads;     // [2 octets][num_rows], of `IntegerKernels::quad_bytes`: four inputs each
  float* scales;   // [num_groups][num_rows]
  float* sums;     // likewise: of what the integers stand for
  int32_t* starts; // likewise: of the integers, times what a weight without sign is more than itself where that is one
                   // number for all; turned round
};

/// Some rows of x against one block of weights.
struct IntegerTile {
  IntegerRows x;
  const uint8_t* w;  // of the block
  const QuantisedFormat* format;
  size_t num_octets;
  size_t ahead_bytes;    // how far before its use w is fetched
  uint16_t* y;           // row stride y_stride
  size_t y_stride;
  size_t num_columns;    // of the block that y has
  const uint16_t* bias;  // of these columns, or null
};

struct IntegerKernels {
  size_t quad_bytes;
  /// x [num_rows, num_inputs], rows x_stride apart, for a weight of this format.
  void (*quantise_rows)(const IntegerRows& out, const uint16_t* x, size_t x_stride, size_t num_rows, size_t num_inputs,
                        const QuantisedFormat& format);
  void (*multiply_bytes[16])(const IntegerTile& tile);  // by number of rows, up to `LinearKernels::most_rows`
  void (*multiply_nibbles[16])(const IntegerTile& tile);
};

/// As `quantised_linear`, by a weight of a format with an `input_group`; x as the weight has its inputs.
void integer_linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride,
                    const QuantisedMatrix& weight, const Outputs& outputs, const uint16_t* bias, size_t num_rows);

}  // namespace phalanx
