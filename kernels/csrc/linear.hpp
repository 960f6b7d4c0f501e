// y = x W^T + b in bfloat16, from weights packed once: sums in float, rounded once at the end.
//
// A packed weight [N, K] is a row of blocks of 32 outputs; in a block the pairs of inputs follow each other, and of each
// pair stand the 32 outputs' two numbers: [N / 32][K / 2][32][2], filled up with zeros. So a product reads its weights
// in one stream, and a register takes 16 outputs at a time.
//
// An output is added up over the inputs in their order, in every path: it does not depend on the other rows of a
// product, nor on the number of threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace phalanx {

constexpr size_t kBlockColumns = 32;

inline size_t num_blocks(size_t num_outputs) { return (num_outputs + kBlockColumns - 1) / kBlockColumns; }
inline size_t num_pairs(size_t num_inputs) { return (num_inputs + 1) / 2; }

/// Some rows of x against part of one block of weights.
struct Tile {
  const void* x;         // [num_pairs][num_rows], as `pack_rows` leaves it
  const uint16_t* w;     // [num_pairs][32][2]
  size_t num_pairs;
  const char* ahead;     // memory that is wanted soon: ahead_step bytes for each pair
  size_t ahead_step;
  float* partial;        // [num_rows][32]: sums so far
  bool first, last;      // of the parts of the block: whether the sums begin here, whether they end here, in y
  uint16_t* y;           // row stride y_stride
  size_t y_stride;
  size_t num_columns;    // of the block that y has
  const uint16_t* bias;  // of these columns, or null
};

/// The functions of one instruction set. most_rows: of a tile. item_bytes: of a pair of a row's inputs.
struct LinearKernels {
  const char* name;
  size_t most_rows;
  size_t item_bytes;
  /// x [num_rows, num_inputs], rows x_stride apart -> [num_pairs][num_rows].
  void (*pack_rows)(void* out, const uint16_t* x, size_t x_stride, size_t num_rows, size_t num_inputs);
  void (*multiply[16])(const Tile& tile);  // by number of rows; those up to most_rows are there
};

/// Of `usable_kernels`, those that can multiply, the best first.
const std::vector<const LinearKernels*>& usable_linears();

/// y [num_rows, num_outputs] = x [num_rows, num_inputs] W^T + bias [num_outputs] (or null). x_stride: elements between
/// rows of x, whose inputs lie side by side. Over the threads of the pool.
void linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const uint16_t* packed,
            const uint16_t* bias, size_t num_rows, size_t num_outputs, size_t num_inputs);

/// Puts rows [first, first + num_rows) of a weight, row-major in `rows`, into their places. Blocks that only part of the
/// rows fall into keep the others'. Over the threads of the pool.
void pack_weight(uint16_t* packed, const uint16_t* rows, size_t first, size_t num_rows, size_t num_inputs);

/// out [count, num_inputs] = the rows of a packed weight [num_outputs, num_inputs] that `indices` names. Throws
/// std::out_of_range for one that it has not.
void unpack_rows(uint16_t* out, const uint16_t* packed, const int64_t* indices, size_t count, size_t num_outputs,
                 size_t num_inputs);

}  // namespace phalanx
