#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "dealer.hpp"
#include "pool.hpp"
#include "reduce.hpp"
#include "scratch.hpp"

namespace phalanx {

extern const LinearKernels kLinear_avx512_bf16, kLinear_avx512, kLinear_avx2;

const std::vector<const LinearKernels*>& usable_linears() {
  static const std::vector<const LinearKernels*> usable = [] {
    std::vector<const LinearKernels*> found;
    const bool fma = __builtin_cpu_supports("fma");
    for (const Kernels* set : usable_kernels()) {
      for (const LinearKernels* each : {&kLinear_avx512_bf16, &kLinear_avx512, &kLinear_avx2}) {
        if (fma && std::strcmp(each->name, set->name) == 0) found.push_back(each);
      }
    }
    return found;
  }();
  return usable;
}

namespace {

// Of a block's weights, at a time: they stay in the second cache, decoded, while all rows pass.
constexpr size_t kMostQuads = 512;

// One product of at most kMostRowsAtOnce rows.
class Product {
 public:
  Product(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const PackedMatrix& weight,
          const Outputs& outputs, const uint16_t* bias, size_t num_rows)
      : kernels_(kernels),
        y_(y),
        x_(x),
        x_stride_(x_stride),
        weight_(weight),
        outputs_(outputs),
        bias_(bias),
        num_rows_(num_rows),
        num_quads_(weight.num_quads()),
        row_bytes_(2 * num_quads_ * kernels.item_bytes),
        num_groups_(divide_up(num_rows, kernels.most_rows)),
        num_parts_(num_groups_ == 1 ? 1 : divide_up(num_quads_, kMostQuads)) {}

  void run() {
    rows_ = scratch<char>(num_rows_ * row_bytes_);
    if (num_rows_ * weight_.num_inputs() <= kPackedAlone) {
      for (size_t group = 0; group < num_groups_; group++) pack_group(group);
    } else {
      parallel_for(int(num_groups_), [this](int group) { pack_group(size_t(group)); });
    }
    deal_blocks(outputs_.num_blocks(), num_groups_, [this](size_t block, size_t first_group, size_t end_group, bool goes_on) {
      multiply(block, first_group, end_group, goes_on);
    });
  }

 private:
  const LinearKernels& kernels_;
  uint16_t* const y_;
  const uint16_t* const x_;
  const size_t x_stride_;
  const PackedMatrix& weight_;
  const Outputs outputs_;
  const uint16_t* const bias_;
  const size_t num_rows_, num_quads_, row_bytes_, num_groups_, num_parts_;
  char* rows_ = nullptr;

  size_t first_row(size_t group) const { return share(num_rows_, group, num_groups_); }

  void pack_group(size_t group) {
    const size_t row = first_row(group), size = first_row(group + 1) - row;
    kernels_.pack_rows(rows_ + row * row_bytes_, x_ + row * x_stride_, x_stride_, size, weight_.num_inputs(), 2 * num_quads_);
  }

  // Some groups of rows by a block. goes_on: whether the next block comes after it. Codes are decoded by the first
  // group for all.
  void multiply(size_t index, size_t first_group, size_t end_group, bool goes_on) {
    struct Sums {
      alignas(64) float of_row[kMostRowsAtOnce][kBlockColumns];
    };
    thread_local std::unique_ptr<Sums> sums;
    if (num_parts_ > 1 && !sums) sums = std::make_unique<Sums>();
    const PackedBlock& block = weight_.block(outputs_.first_block + index);
    const uint8_t* const held = block.plain ? block.plain.get() : block.codes;
    const size_t quad_bytes = block.plain ? kPlainQuadBytes : kQuadBytes;
    const size_t num_groups = end_group - first_group, column = index * kBlockColumns;
    const bool keeps = !block.plain && num_groups > 1;
    uint8_t* const decoded = keeps ? scratch<uint8_t>(kMostQuads * kPlainQuadBytes) : nullptr;
    const auto& codes = keeps ? kernels_.multiply_kept_codes : kernels_.multiply_codes;
    Tile tile{};
    tile.block = &block;
    tile.decoded = decoded;
    tile.y_stride = outputs_.size;
    tile.num_columns = std::min(kBlockColumns, outputs_.size - column);
    tile.bias = bias_ == nullptr ? nullptr : bias_ + column;
    for (size_t part = 0; part < num_parts_; part++) {
      const size_t quad = share(num_quads_, part, num_parts_);
      tile.num_quads = share(num_quads_, part + 1, num_parts_) - quad;
      tile.first = part == 0;
      tile.last = part + 1 == num_parts_;
      const uint8_t* const weights = held + quad * quad_bytes;
      const size_t part_bytes = tile.num_quads * quad_bytes;
      // The first group reads from memory; the others fetch what comes next between them.
      const bool fetches = num_groups > 1 && (goes_on || !tile.last);
      for (size_t group = 0; group < num_groups; group++) {
        const size_t row = first_row(first_group + group), size = first_row(first_group + group + 1) - row;
        const char* const x = rows_ + row * row_bytes_;
        tile.whole_x = x;
        tile.x = x + 2 * quad * size * kernels_.item_bytes;
        tile.w = keeps && group > 0 ? decoded : weights;
        tile.ahead_bytes = group > 0 ? kNearBytes : kAheadBytes;
        tile.next = tile.w;
        tile.next_step = 0;
        if (fetches && group > 0) {
          tile.next = weights + part_bytes + share(part_bytes, group - 1, num_groups - 1);
          tile.next_step = quad_bytes / (num_groups - 1);
        }
        tile.partial = num_parts_ == 1 ? nullptr : sums->of_row[row];
        tile.y = y_ + row * outputs_.size + column;
        (block.plain || group > 0 ? kernels_.multiply_plain : codes)[size](tile);
      }
    }
  }
};

}  // namespace

void linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const PackedMatrix& weight,
            const Outputs& outputs, const uint16_t* bias, size_t num_rows) {
  const size_t passes = divide_up(num_rows, kMostRowsAtOnce);
  for (size_t pass = 0; pass < passes; pass++) {
    const size_t row = share(num_rows, pass, passes), size = share(num_rows, pass + 1, passes) - row;
    Product(kernels, y + row * outputs.size, x + row * x_stride, x_stride, weight, outputs, bias, size).run();
  }
}

}  // namespace phalanx
