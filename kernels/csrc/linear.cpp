#include "linear.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>

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
// Rows at a time: weights are read from memory once for so many, and these rows of x stay in the last cache.
constexpr size_t kMostRowsAtOnce = 384;
constexpr size_t kAheadBytes = 4096;  // that memory needs to answer in time
constexpr size_t kNearBytes = 1024;   // and the second cache
constexpr size_t kComputeTasks = 16;  // of a thread, so that one who comes late leaves work to the others
constexpr size_t kStreamGroups = 4;  // of rows, at most, where the weights' way from memory still tells
constexpr size_t kPackedAlone = 16384;  // inputs that one thread packs before another would be there

size_t share(size_t total, size_t part, size_t num_parts) { return total * part / num_parts; }
size_t divide_up(size_t total, size_t by) { return (total + by - 1) / by; }

// Blocks dealt out so that each thread reads a stream of its own, and who is done early takes from the others' ends.
class Dealer {
 public:
  Dealer(size_t blocks, size_t threads) : ranges_(threads) {
    for (size_t i = 0; i < threads; i++) {
      ranges_[i].left.store(pack(share(blocks, i, threads), share(blocks, i + 1, threads)), std::memory_order_relaxed);
    }
  }

  // The next block of a thread, or of another one; false where none is left.
  bool take(size_t thread, size_t& block) {
    if (take_from(ranges_[thread], block, true)) return true;
    for (size_t i = 1; i < ranges_.size(); i++) {
      if (take_from(ranges_[(thread + i) % ranges_.size()], block, false)) return true;
    }
    return false;
  }

 private:
  struct alignas(64) Range {
    std::atomic<uint64_t> left{0};  // first and end
  };
  std::vector<Range> ranges_;

  static uint64_t pack(size_t first, size_t end) { return uint64_t(first) << 32 | end; }

  static bool take_from(Range& range, size_t& block, bool front) {
    uint64_t left = range.left.load(std::memory_order_relaxed);
    for (;;) {
      const size_t first = left >> 32, end = uint32_t(left);
      if (first == end) return false;
      const uint64_t rest = front ? pack(first + 1, end) : pack(first, end - 1);
      if (range.left.compare_exchange_weak(left, rest, std::memory_order_relaxed)) {
        block = front ? first : end - 1;
        return true;
      }
    }
  }
};

// One product of at most kMostRowsAtOnce rows.
class Product {
 public:
  Product(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const PackedMatrix& weight,
          const uint16_t* bias, size_t num_rows)
      : kernels_(kernels),
        y_(y),
        x_(x),
        x_stride_(x_stride),
        weight_(weight),
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
    const size_t blocks = weight_.num_blocks(), threads = size_t(Pool::instance().size());
    if (num_groups_ <= kStreamGroups) {
      Dealer dealer(blocks, threads);
      parallel_for(int(threads), [&](int thread) {
        for (size_t block; dealer.take(size_t(thread), block);) multiply(block, 0, num_groups_, block + 1 < blocks);
      });
      return;
    }
    const size_t most_tasks = kComputeTasks * threads, each = std::max<size_t>(1, blocks / most_tasks);
    const size_t slices = std::min(num_groups_ / 2, divide_up(most_tasks, blocks));
    parallel_for(int(divide_up(blocks, each) * slices), [&](int task) {
      const size_t first = size_t(task) / slices * each, end = std::min(blocks, first + each), slice = size_t(task) % slices;
      const size_t first_group = share(num_groups_, slice, slices), end_group = share(num_groups_, slice + 1, slices);
      for (size_t block = first; block < end; block++) multiply(block, first_group, end_group, block + 1 < end);
    });
  }

 private:
  const LinearKernels& kernels_;
  uint16_t* const y_;
  const uint16_t* const x_;
  const size_t x_stride_;
  const PackedMatrix& weight_;
  const uint16_t* const bias_;
  const size_t num_rows_, num_quads_, row_bytes_, num_groups_, num_parts_;
  char* rows_ = nullptr;

  size_t first_row(size_t group) const { return share(num_rows_, group, num_groups_); }

  void pack_group(size_t group) {
    const size_t row = first_row(group), size = first_row(group + 1) - row;
    kernels_.pack_rows(rows_ + row * row_bytes_, x_ + row * x_stride_, x_stride_, size, weight_.num_inputs());
  }

  // Some groups of rows by a block. goes_on: whether the next block comes after it. Codes are decoded by the first
  // group for all.
  void multiply(size_t index, size_t first_group, size_t end_group, bool goes_on) {
    struct Sums {
      alignas(64) float of_row[kMostRowsAtOnce][kBlockColumns];
    };
    thread_local std::unique_ptr<Sums> sums;
    if (num_parts_ > 1 && !sums) sums = std::make_unique<Sums>();
    const PackedBlock& block = weight_.block(index);
    const uint8_t* const held = block.plain ? block.plain.get() : block.codes;
    const size_t quad_bytes = block.plain ? kPlainQuadBytes : kQuadBytes;
    const size_t num_groups = end_group - first_group, column = index * kBlockColumns;
    const bool keeps = !block.plain && num_groups > 1;
    uint8_t* const decoded = keeps ? scratch<uint8_t>(kMostQuads * kPlainQuadBytes) : nullptr;
    const auto& codes = keeps ? kernels_.multiply_kept_codes : kernels_.multiply_codes;
    Tile tile{};
    tile.block = &block;
    tile.decoded = decoded;
    tile.y_stride = weight_.num_outputs();
    tile.num_columns = std::min(kBlockColumns, weight_.num_outputs() - column);
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
        tile.y = y_ + row * weight_.num_outputs() + column;
        (block.plain || group > 0 ? kernels_.multiply_plain : codes)[size](tile);
      }
    }
  }
};

}  // namespace

void linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const PackedMatrix& weight,
            const uint16_t* bias, size_t num_rows) {
  const size_t passes = divide_up(num_rows, kMostRowsAtOnce);
  for (size_t pass = 0; pass < passes; pass++) {
    const size_t row = share(num_rows, pass, passes), size = share(num_rows, pass + 1, passes) - row;
    Product(kernels, y + row * weight.num_outputs(), x + row * x_stride, x_stride, weight, bias, size).run();
  }
}

}  // namespace phalanx
