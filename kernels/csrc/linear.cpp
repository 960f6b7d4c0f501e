#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

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

// Of a block's weights, at a time: they stay in the second cache while all rows pass.
constexpr size_t kMostPairs = 1024;
// Rows at a time: weights are read from memory once for so many, and these rows of x stay in the last cache.
constexpr size_t kMostRowsAtOnce = 384;
constexpr size_t kAheadBytes = 4096;  // that memory needs to answer in time
// Tasks of a thread: several, so that one who comes late leaves work to the others; few where they read a stream from
// memory, many where they compute.
constexpr size_t kStreamTasks = 4, kComputeTasks = 16;
constexpr size_t kStreamGroups = 4;  // of rows, at most, where the weights' way from memory still tells
constexpr size_t kPackedAlone = 16384;  // inputs that one thread packs before another would be there

size_t share(size_t total, size_t part, size_t num_parts) { return total * part / num_parts; }
size_t divide_up(size_t total, size_t by) { return (total + by - 1) / by; }

// Blocks of a task, so that tasks are few and go evenly into the threads.
size_t blocks_of_task(size_t blocks, size_t threads) {
  const size_t least = std::max<size_t>(1, blocks / (kStreamTasks * threads));
  size_t best = least, best_longest = blocks;
  for (size_t each = least; each <= 2 * least; each++) {
    const size_t longest = divide_up(divide_up(blocks, each), threads) * each;
    if (longest < best_longest) {
      best = each;
      best_longest = longest;
    }
  }
  return best;
}

// One product of at most kMostRowsAtOnce rows.
class Product {
 public:
  Product(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const uint16_t* packed,
          const uint16_t* bias, size_t num_rows, size_t num_outputs, size_t num_inputs)
      : kernels_(kernels),
        y_(y),
        x_(x),
        x_stride_(x_stride),
        packed_(packed),
        bias_(bias),
        num_rows_(num_rows),
        num_outputs_(num_outputs),
        num_inputs_(num_inputs),
        num_pairs_(num_pairs(num_inputs)),
        num_groups_(divide_up(num_rows, kernels.most_rows)),
        num_parts_(num_groups_ == 1 ? 1 : divide_up(num_pairs_, kMostPairs)) {}

  void run() {
    rows_ = scratch<char>(num_rows_ * num_pairs_ * kernels_.item_bytes);
    if (num_rows_ * num_inputs_ <= kPackedAlone) {
      for (size_t group = 0; group < num_groups_; group++) pack_group(group);
    } else {
      parallel_for(int(num_groups_), [this](int group) { pack_group(size_t(group)); });
    }
    const size_t blocks = num_blocks(num_outputs_), threads = size_t(Pool::instance().size());
    if (num_groups_ <= kStreamGroups) {
      const size_t each = blocks_of_task(blocks, threads);
      parallel_for(int(divide_up(blocks, each)), [&](int task) {
        const size_t end = std::min(blocks, (size_t(task) + 1) * each);
        for (size_t block = size_t(task) * each; block < end; block++) multiply(block, 0, num_groups_, block + 1 < end);
      });
    } else {
      const size_t slices = std::min(num_groups_ / 2, divide_up(kComputeTasks * threads, blocks));
      parallel_for(int(blocks * slices), [&](int task) {
        const size_t block = size_t(task) / slices, slice = size_t(task) % slices;
        multiply(block, share(num_groups_, slice, slices), share(num_groups_, slice + 1, slices), false);
      });
    }
  }

 private:
  const LinearKernels& kernels_;
  uint16_t* const y_;
  const uint16_t* const x_;
  const size_t x_stride_;
  const uint16_t* const packed_;
  const uint16_t* const bias_;
  const size_t num_rows_, num_outputs_, num_inputs_, num_pairs_, num_groups_, num_parts_;
  char* rows_ = nullptr;

  size_t first_row(size_t group) const { return share(num_rows_, group, num_groups_); }

  void pack_group(size_t group) {
    const size_t row = first_row(group), size = first_row(group + 1) - row;
    char* out = rows_ + row * num_pairs_ * kernels_.item_bytes;
    kernels_.pack_rows(out, x_ + row * x_stride_, x_stride_, size, num_inputs_);
  }

  // Some groups of rows by a block. goes_on: whether the next block comes after it.
  void multiply(size_t block, size_t first_group, size_t end_group, bool goes_on) {
    struct Sums {
      alignas(64) float of_row[kMostRowsAtOnce][kBlockColumns];
    };
    thread_local std::unique_ptr<Sums> sums;
    if (num_parts_ > 1 && !sums) sums = std::make_unique<Sums>();
    const size_t column = block * kBlockColumns;
    Tile tile{};
    tile.y_stride = num_outputs_;
    tile.num_columns = std::min(kBlockColumns, num_outputs_ - column);
    tile.bias = bias_ == nullptr ? nullptr : bias_ + column;
    for (size_t part = 0; part < num_parts_; part++) {
      const size_t pair = share(num_pairs_, part, num_parts_);
      tile.num_pairs = share(num_pairs_, part + 1, num_parts_) - pair;
      tile.w = packed_ + (block * num_pairs_ + pair) * kBlockColumns * 2;
      tile.first = part == 0;
      tile.last = part + 1 == num_parts_;
      // The first group reads from memory and looks ahead of itself; the others fetch what comes next between them.
      const char* const weights = reinterpret_cast<const char*>(tile.w);
      const size_t pair_bytes = 2 * kBlockColumns * sizeof(uint16_t), part_bytes = tile.num_pairs * pair_bytes;
      const size_t fetchers = end_group - first_group - 1;
      for (size_t group = first_group; group < end_group; group++) {
        const size_t row = first_row(group), size = first_row(group + 1) - row;
        tile.x = rows_ + (row * num_pairs_ + pair * size) * kernels_.item_bytes;
        tile.ahead = weights + kAheadBytes;
        tile.ahead_step = pair_bytes;
        if (group > first_group && (goes_on || !tile.last)) {
          tile.ahead = weights + part_bytes + share(part_bytes, group - first_group - 1, fetchers);
          tile.ahead_step = pair_bytes / fetchers;
        }
        tile.partial = num_parts_ == 1 ? nullptr : sums->of_row[row];
        tile.y = y_ + row * num_outputs_ + column;
        kernels_.multiply[size](tile);
      }
    }
  }
};

}  // namespace

void linear(const LinearKernels& kernels, uint16_t* y, const uint16_t* x, size_t x_stride, const uint16_t* packed,
            const uint16_t* bias, size_t num_rows, size_t num_outputs, size_t num_inputs) {
  const size_t passes = (num_rows + kMostRowsAtOnce - 1) / kMostRowsAtOnce;
  for (size_t pass = 0; pass < passes; pass++) {
    const size_t row = share(num_rows, pass, passes), size = share(num_rows, pass + 1, passes) - row;
    Product(kernels, y + row * num_outputs, x + row * x_stride, x_stride, packed, bias, size, num_outputs, num_inputs).run();
  }
}

void pack_weight(uint16_t* packed, const uint16_t* rows, size_t first, size_t num_rows, size_t num_inputs) {
  constexpr size_t kAtOnce = 16;  // pairs: of each row a line of the cache, read once
  const size_t pairs = num_pairs(num_inputs);
  const size_t first_block = first / kBlockColumns, end_block = num_blocks(first + num_rows);
  parallel_for(int(end_block - first_block), [&](int index) {
    const size_t block = first_block + size_t(index);
    const size_t begin = std::max(first, block * kBlockColumns), end = std::min(first + num_rows, (block + 1) * kBlockColumns);
    for (size_t pair = 0; pair < pairs; pair += kAtOnce) {
      const size_t count = std::min(kAtOnce, pairs - pair);
      uint16_t lines[kBlockColumns][2 * kAtOnce] = {};
      for (size_t row = begin; row < end; row++) {
        const size_t inputs = std::min(2 * count, num_inputs - 2 * pair);
        std::memcpy(lines[row % kBlockColumns], rows + (row - first) * num_inputs + 2 * pair, inputs * sizeof(uint16_t));
      }
      uint16_t* out = packed + (block * pairs + pair) * kBlockColumns * 2;
      for (size_t k = 0; k < count; k++) {
        for (size_t row = begin; row < end; row++) {
          const size_t lane = row % kBlockColumns;
          std::memcpy(out + (k * kBlockColumns + lane) * 2, &lines[lane][2 * k], 2 * sizeof(uint16_t));
        }
      }
    }
  });
}

void unpack_rows(uint16_t* out, const uint16_t* packed, const int64_t* indices, size_t count, size_t num_outputs,
                 size_t num_inputs) {
  const size_t pairs = num_pairs(num_inputs);
  for (size_t i = 0; i < count; i++) {
    if (indices[i] < 0 || size_t(indices[i]) >= num_outputs) {
      throw std::out_of_range("row " + std::to_string(indices[i]) + " of a weight of " + std::to_string(num_outputs) + " rows");
    }
    const size_t row = size_t(indices[i]), lane = row % kBlockColumns;
    const uint16_t* from = packed + (row / kBlockColumns * pairs * kBlockColumns + lane) * 2;
    uint16_t* to = out + i * num_inputs;
    for (size_t k = 0; k < num_inputs / 2; k++) std::memcpy(to + 2 * k, from + k * kBlockColumns * 2, 2 * sizeof(uint16_t));
    if (num_inputs % 2 == 1) to[num_inputs - 1] = from[(pairs - 1) * kBlockColumns * 2];
  }
}

}  // namespace phalanx
