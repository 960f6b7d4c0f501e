// y = x W^T + b in bfloat16, from a `PackedMatrix`: sums in float, rounded once at the end.
//
// A product reads its weights in one stream, and a register takes 16 outputs at a time. An output is added up over the
// inputs in their order, and over its outliers after them, in every path: it does not depend on the other rows of a
// product, nor on the number of threads. Of an input that is not finite an outlier makes not-a-number.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "packed.hpp"

namespace phalanx {

constexpr size_t kNextBytes = kQuadBytes;

/// Some rows of x against part of one block of weights.
struct Tile {
  const void* x;             // [2 num_quads][num_rows], as `pack_rows` leaves it
  const void* whole_x;       // of all parts of the block
  const PackedBlock* block;  // its exponents and outliers
  const uint8_t* w;          // [num_quads] of the block, as codes or plain
  uint8_t* decoded;          // where codes that are kept are put, plain
  size_t num_quads;
  size_t ahead_bytes;        // how far before its use w is fetched
  const uint8_t* next;       // memory that is wanted after w: next_step bytes for each quad, at most kNextBytes
  size_t next_step;
  float* partial;            // [num_rows][32]: sums so far
  bool first, last;          // of the parts of the block: whether the sums begin here, whether they end here, in y
  uint16_t* y;               // row stride y_stride
  size_t y_stride;
  size_t num_columns;        // of the block that y has
  const uint16_t* bias;      // of these columns, or null
};

struct QuantisedKernels;

/// The functions of one instruction set. most_rows: of a tile. item_bytes: of a pair of a row's inputs.
struct LinearKernels {
  const char* name;
  size_t most_rows;
  size_t item_bytes;
  /// x [num_rows, num_inputs], rows x_stride apart -> [num_pairs][num_rows], filled up with zeros.
  void (*pack_rows)(void* out, const uint16_t* x, size_t x_stride, size_t num_rows, size_t num_inputs, size_t num_pairs);
  // By number of rows; those up to most_rows are there. From codes, from codes which are put down plain for other rows,
  // from plain weights, which also fetch what is wanted next.
  void (*multiply_codes[16])(const Tile& tile);
  void (*multiply_kept_codes[16])(const Tile& tile);
  void (*multiply_plain[16])(const Tile& tile);
  const QuantisedKernels* quantised;
};

/// Of `usable_kernels`, those that can multiply, the best first.
const std::vector<const LinearKernels*>& usable_linears();

/// y [num_rows, outputs] = x [num_rows, num_inputs] W^T + bias [outputs] (or null), of these outputs of W. x_stride: elements between
/// rows of x, whose inputs lie side by side. Over the threads of the pool.
void linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const PackedMatrix& weight,
            const Outputs& outputs, const uint16_t* bias, size_t num_rows);

}  // namespace phalanx
