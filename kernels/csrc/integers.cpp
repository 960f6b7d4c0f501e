#include "integers.hpp"

#include <algorithm>

#include "dealer.hpp"
#include "quantised.hpp"
#include "scratch.hpp"

namespace phalanx {

constexpr size_t kAheadOfIntegers = 2 * kAheadBytes;  // one row passes sooner than in bfloat16

void integer_linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride,
                    const QuantisedMatrix& weight, const Outputs& outputs, const uint16_t* bias, size_t num_rows) {
  const IntegerKernels& functions = *kernels.quantised->integers;
  const QuantisedFormat& format = weight.format();
  const size_t num_inputs = weight.num_inputs(), num_groups = format.num_input_groups(num_inputs);
  const size_t row_bytes = 2 * weight.num_octets() * functions.quad_bytes;
  const size_t num_tiles = divide_up(num_rows, kernels.most_rows);
  float* const scales = scratch<float>(2 * num_rows * num_groups);
  const IntegerRows whole{scratch<char>(num_rows * row_bytes), scales, scales + num_rows * num_groups,
                          scratch<int32_t>(num_rows * num_groups)};
  const auto first_row = [=](size_t tile) { return share(num_rows, tile, num_tiles); };
  const auto rows_of = [=](size_t tile) -> IntegerRows {
    const size_t row = first_row(tile), at = row * num_groups;
    return {static_cast<char*>(whole.quads) + row * row_bytes, whole.scales + at, whole.sums + at, whole.starts + at};
  };
  const auto quantise = [&](size_t tile) {
    const size_t row = first_row(tile);
    functions.quantise_rows(rows_of(tile), x + row * x_stride, x_stride, first_row(tile + 1) - row, num_inputs, format);
  };
  if (num_rows * num_inputs <= kPackedAlone) {
    for (size_t tile = 0; tile < num_tiles; tile++) quantise(tile);
  } else {
    parallel_for(int(num_tiles), [&](int tile) { quantise(size_t(tile)); });
  }
  const auto& by_rows = format.bits == 4 ? functions.multiply_nibbles : functions.multiply_bytes;
  deal_blocks(outputs.num_blocks(), num_tiles, [&](size_t index, size_t first_tile, size_t end_tile, bool) {
    const size_t column = index * kBlockColumns;
    IntegerTile tile{};
    tile.w = weight.block(outputs.first_block + index);
    tile.format = &format;
    tile.num_octets = weight.num_octets();
    tile.y_stride = outputs.size;
    tile.num_columns = std::min(kBlockColumns, outputs.size - column);
    tile.bias = bias == nullptr ? nullptr : bias + column;
    for (size_t each = first_tile; each < end_tile; each++) {
      const size_t row = first_row(each);
      tile.x = rows_of(each);
      tile.ahead_bytes = each > first_tile ? kNearBytes : kAheadOfIntegers;
      tile.y = y + row * outputs.size + column;
      by_rows[first_row(each + 1) - row](tile);
    }
  });
}

}  // namespace phalanx
