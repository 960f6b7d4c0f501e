// Attention of a few rows over the pages of one sequence (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867;
// over blocks: Dao et al. 2022, arXiv 2205.14135). Part of `operator_kernels.cpp`.
//
// A row is a query head of a token. Keys are taken in blocks and splits whose borders lie at multiples of their sizes
// from the start of the sequence; within a split, states follow from block to block, and splits are joined in order. So
// what a row gets depends on nothing but its own query, keys and values: blocks that it does not see leave its state as
// it is, to the bit.
#pragma once
#include "attention.hpp"
#include "operators.hpp"
#include "tile.hpp"

namespace phalanx {
namespace {

// Below every score, and not infinite, so that differences stay numbers.
constexpr float kNothingSeen = -1e30f;

inline size_t rounded_up(size_t count, size_t step) { return (count + step - 1) / step * step; }

// What a number is multiplied as.
template <typename T>
struct UnitOf {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BF16> {
  using type = BF16Pair;
};
#endif

// Largest score, sum of weights and weighted sum of values of num_rows rows, [num_rows, width].
struct State {
  float *largest, *total, *values;
  size_t num_rows, width;

  static size_t num_floats(size_t num_rows, size_t width) { return num_rows * (width + 2); }
  State(float* at, size_t num_rows, size_t width)
      : largest(at), total(at + num_rows), values(at + 2 * num_rows), num_rows(num_rows), width(width) {}

  void clear() {
    for (size_t row = 0; row < num_rows; row++) largest[row] = kNothingSeen, total[row] = 0;
    std::memset(values, 0, num_rows * width * sizeof(float));
  }

  // Takes in the state of later keys.
  void join(const State& later) {
    for (size_t row = 0; row < num_rows; row++) {
      const float top = largest[row] > later.largest[row] ? largest[row] : later.largest[row];
      const V ours = exponential(all(largest[row] - top)), theirs = exponential(all(later.largest[row] - top));
      float scale[2][kWidth];
      store(scale[0], ours);
      store(scale[1], theirs);
      largest[row] = top;
      total[row] = total[row] * scale[0][0] + later.total[row] * scale[1][0];
      float *to = values + row * width, *from = later.values + row * width;
      for (size_t i = 0; i < width; i += kWidth) {
        store(to + i, add(multiply(load(to + i), ours), multiply(load(from + i), theirs)));
      }
    }
  }
};

inline size_t width_of(int head_dim) { return rounded_up(size_t(head_dim), kWidth); }

inline size_t partial_floats(int head_dim, int num_rows) {
  return State::num_floats(size_t(num_rows), width_of(head_dim));
}

// Hands out parts of the scratch, each at a cache line.
class Carver {
 public:
  explicit Carver(float* at) : at_(at) {}
  template <typename U>
  U* take(size_t count) {
    U* taken = reinterpret_cast<U*>(at_ + used_);
    used_ += rounded_up(count * sizeof(U), 64) / sizeof(float);
    return taken;
  }
  size_t used() const { return used_; }

 private:
  float* at_;
  size_t used_ = 0;
};

template <typename T>
struct Buffers {
  using U = typename UnitOf<T>::type;
  static constexpr size_t kPerUnit = std::is_same<U, float>::value ? 1 : 2;

  size_t width, num_units;
  U *queries, *keys, *values, *weights;
  float *scores, *factors, *whole, *split;
  size_t num_floats;

  Buffers(float* scratch, int head_dim, size_t num_rows)
      : width(width_of(head_dim)), num_units(rounded_up(size_t(head_dim), kPerUnit * kWidth) / kPerUnit) {
    Carver carver(scratch);
    queries = carver.take<U>(num_rows * num_units);
    keys = carver.take<U>(num_units * kKeyBlock);
    values = carver.take<U>(kKeyBlock / kPerUnit * width);
    weights = carver.take<U>(num_rows * kKeyBlock / kPerUnit);
    scores = carver.take<float>(num_rows * kKeyBlock);
    factors = carver.take<float>(num_rows);
    whole = carver.take<float>(State::num_floats(num_rows, width));
    split = carver.take<float>(State::num_floats(num_rows, width));
    num_floats = carver.used();
  }
};

template <typename T>
size_t attention_scratch(int head_dim, int num_rows) {
  return Buffers<T>(nullptr, head_dim, size_t(num_rows)).num_floats;
}

inline V capped(V score, float softcap) {
  return multiply(all(softcap), tanh_of(divide(score, all(softcap))));
}

// Turns a row of scores into weights. seen: the columns [first, last) of num_columns, a multiple of kWidth, count. The
// state is that of the row; returns what its values so far are to be multiplied with.
template <typename U>
inline float weigh(const Attention& attention, float* scores, U* weights, size_t first, size_t last, size_t num_columns,
                   float& largest, float& total) {
  const V scale = all(attention.scale);
  V top = all(kNothingSeen);
  for (size_t i = 0; i < num_columns; i += kWidth) {
    V score = multiply(load(scores + i), scale);
    if (attention.softcap > 0) score = capped(score, attention.softcap);
    store(scores + i, score);
    if (first <= i && i + kWidth <= last) top = most(top, score);
  }
  // What is not seen, whatever is there, and the largest of registers that are seen in part.
  for (size_t i = 0; i < num_columns; i += kWidth) {
    if (first <= i && i + kWidth <= last) continue;
    for (size_t j = i; j < i + kWidth; j++) {
      if (j < first || j >= last) scores[j] = -__builtin_inff();
    }
    top = most(top, load(scores + i));
  }
  const float highest = largest_of(top);
  const float new_largest = largest > highest ? largest : highest;
  float factor[kWidth];
  store(factor, exponential(all(largest - new_largest)));
  const V shift = all(new_largest);
  V sum = all(0);
  size_t i = 0;
#if defined(__AVX512BF16__)
  if constexpr (!std::is_same<U, float>::value) {
    for (; i < num_columns; i += kWidth) {
      const __m256bh halves = _mm512_cvtneps_pbh(exponential(subtract(load(scores + i), shift)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i / 2), (__m256i)halves);
      sum = add(sum, _mm512_cvtpbh_ps(halves));
    }
  } else
#endif
  {
    for (; i < num_columns; i += kWidth) {
      const V weight = exponential(subtract(load(scores + i), shift));
      store(weights + i, weight);
      sum = add(sum, weight);
    }
  }
  total = total * factor[0] + sum_of(sum);
  largest = new_largest;
  return factor[0];
}

// Where row `row` of the part writes.
template <typename T>
inline T* output_of(const Attention& attention, const AttentionPart& part, size_t row) {
  const size_t token = row / size_t(part.group), place = row % size_t(part.group);
  return static_cast<T*>(attention.out) + (part.row + int64_t(token)) * attention.out_stride +
         int64_t(part.heads[place]) * attention.head_dim;
}

template <typename T>
inline void write_output(const Attention& attention, const AttentionPart& part, const State& state) {
  for (size_t row = 0; row < state.num_rows; row++) {
    const V by = all(1.0f / state.total[row]);
    const float* values = state.values + row * state.width;
    T* to = output_of<T>(attention, part, row);
    size_t i = 0;
    for (; i + kWidth <= size_t(attention.head_dim); i += kWidth) store(to + i, multiply(load(values + i), by));
    if (i < size_t(attention.head_dim)) {
      T rest[kWidth];
      store(rest, multiply(load(values + i), by));
      std::memcpy(to + i, rest, (size_t(attention.head_dim) - i) * sizeof(T));
    }
  }
}

inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// Where the keys and values of a block lie.
template <typename T>
struct KeyRows {
  const T *keys[kKeyBlock], *values[kKeyBlock];
  size_t count;

  // Of the block at position `key`, below `stop`; what lies before `start` is not read, but its place is kept. Fetches
  // them into the second cache: pages are scattered, and a head's rows lie apart, so that the processor does not foresee them.
  void find(const Attention& attention, const AttentionPart& part, int64_t key, int64_t start, int64_t stop) {
    count = size_t(lesser(stop - key, kKeyBlock));
    const size_t skipped = size_t(greater(start - key, 0));
    int64_t page = (key + int64_t(skipped)) / attention.page_size;
    int64_t slot = (key + int64_t(skipped)) % attention.page_size;
    const int64_t head = int64_t(part.kv_head) * attention.head_stride;
    const size_t row_bytes = size_t(attention.head_dim) * sizeof(T);
    for (size_t i = skipped; i < count; i++) {
      const int64_t place = part.pages[page] * attention.page_stride + slot * attention.slot_stride + head;
      keys[i] = static_cast<const T*>(attention.keys) + place;
      values[i] = static_cast<const T*>(attention.values) + place;
      for (size_t byte = 0; byte < row_bytes; byte += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(keys[i]) + byte, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(values[i]) + byte, 0, 2);
      }
      if (++slot == attention.page_size) slot = 0, page++;
    }
    // Any row will do, once it is known to be one.
    for (size_t i = 0; i < skipped; i++) keys[i] = keys[skipped], values[i] = values[skipped];
  }
};

// Takes the keys of one block, from position `key` on, into the state.
template <typename T>
inline void attend_block(const Attention& attention, const AttentionPart& part, const Buffers<T>& at,
                         const KeyRows<T>& rows, int64_t key, const State& state) {
  constexpr size_t kPerUnit = Buffers<T>::kPerUnit;
  const size_t group = size_t(part.group), head_dim = size_t(attention.head_dim), count = rows.count;
  // Rows that see any of these keys.
  const int64_t first_token = greater(key - part.position, 0);
  int64_t last_token = part.num_tokens;
  if (attention.window > 0) {
    last_token = lesser(last_token, key + int64_t(count) + attention.window - 1 - part.position);
  }
  const size_t first_row = size_t(first_token) * group, num_rows = size_t(last_token - first_token) * group;
  const size_t num_columns = rounded_up(count, kWidth);
  pack_keys<kKeyBlock>(at.keys, rows.keys, count, head_dim);
  product_all(at.queries + first_row * at.num_units, at.num_units, at.keys, kKeyBlock,
              (head_dim + kPerUnit - 1) / kPerUnit, at.scores, kKeyBlock, nullptr, num_rows, num_columns);
  for (size_t row = 0; row < num_rows; row++) {
    const int64_t position = part.position + int64_t((first_row + row) / group);
    const int64_t first = greater(first_seen(position, attention.window) - key, 0);
    const int64_t last = lesser(position + 1 - key, int64_t(count));
    at.factors[row] = weigh(attention, at.scores + row * kKeyBlock, at.weights + row * (kKeyBlock / kPerUnit),
                            size_t(first), size_t(last), num_columns, state.largest[first_row + row],
                            state.total[first_row + row]);
  }
  pack_values(at.values, at.width, rows.values, count, head_dim);
  product_all(at.weights, kKeyBlock / kPerUnit, at.values, at.width, (count + kPerUnit - 1) / kPerUnit,
              state.values + first_row * at.width, at.width, at.factors, num_rows, at.width);
}

template <typename T>
void attend(const Attention& attention, const AttentionPart& part, float* scratch) {
  const size_t group = size_t(part.group), num_rows = size_t(part.num_tokens) * group;
  const Buffers<T> at(scratch, attention.head_dim, num_rows);
  for (size_t row = 0; row < num_rows; row++) {
    const T* query = static_cast<const T*>(attention.query) + (part.row + int64_t(row / group)) * attention.query_stride +
                     int64_t(part.heads[row % group]) * attention.head_dim;
    pack_row(at.queries + row * at.num_units, query, size_t(attention.head_dim));
  }
  const int64_t position_after = part.position + part.num_tokens;
  const int64_t start = first_seen(part.position, attention.window);
  const int64_t stop = lesser(position_after, part.last_split * kSplit);
  // The block of `start` or of the first split, whichever is later.
  int64_t key = greater(start / kKeyBlock * kKeyBlock, part.first_split * kSplit);
  State whole(at.whole, num_rows, at.width), split(at.split, num_rows, at.width);
  State* state = &whole;
  whole.clear();
  KeyRows<T> rows[2];
  rows[0].find(attention, part, key, start, stop);
  for (size_t turn = 0; key < stop; turn ^= 1) {
    const KeyRows<T>& found = rows[turn];
    const int64_t next = key + kKeyBlock;
    if (next < stop) rows[turn ^ 1].find(attention, part, next, start, stop);  // on their way meanwhile
    attend_block(attention, part, at, found, key, *state);
    if (next % kSplit == 0 || next >= stop) {
      if (state == &split) whole.join(split);
      state = &split;
      split.clear();
    }
    key = next;
  }
  if (part.partial != nullptr) {
    std::memcpy(part.partial, at.whole, State::num_floats(num_rows, at.width) * sizeof(float));
  } else {
    write_output<T>(attention, part, whole);
  }
}

template <typename T>
void join_splits(const Attention& attention, const AttentionPart& part) {
  const size_t num_rows = size_t(part.num_tokens) * size_t(part.group), width = width_of(attention.head_dim);
  State whole(part.partial, num_rows, width);
  for (int64_t number = 1; number < part.last_split - part.first_split; number++) {
    whole.join(State(part.partial + size_t(number) * part.partial_stride, num_rows, width));
  }
  write_output<T>(attention, part, whole);
}

}  // namespace
}  // namespace phalanx
