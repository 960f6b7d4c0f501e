// Attention of a few rows over the pages of one sequence (online softmax: Milakov and Gimelshein 2018, arXiv 1805.02867;
// over blocks: Dao et al. 2022, arXiv 2205.14135). Part of `operator_kernels.cpp`.
//
// A row is a query head of a token. Keys are taken in blocks and splits whose borders lie at multiples of their sizes
// from the start of the sequence; within a split, states follow from block to block, and splits are joined in order. So
// what a row gets depends on nothing but its own query, keys and values: blocks that it does not see leave its state as
// it is, to the bit.
#pragma once
#include "attention.hpp"
#include "direct.hpp"
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

// Of what is multiplied as that.
template <typename T, typename C>
using LiftOf = std::conditional_t<std::is_same<typename UnitOf<T>::type, float>::value, Lift<T>, Lift<C>>;

// Largest score, sum of weights and weighted sum of values of num_rows rows, [num_rows, width].
struct State {
  float *largest, *total, *values;
  size_t num_rows, width;

  static size_t num_floats(size_t num_rows, size_t width) { return num_rows * (width + 2); }
  State(float* at, size_t num_rows, size_t width)
      : largest(at), total(at + num_rows), values(at + 2 * num_rows), num_rows(num_rows), width(width) {}

  // Those from `first` on.
  State rows(size_t first, size_t count) const {
    State found = *this;
    found.largest += first;
    found.total += first;
    found.values += first * width;
    found.num_rows = count;
    return found;
  }

  void clear() {
    for (size_t row = 0; row < num_rows; row++) largest[row] = kNothingSeen, total[row] = 0;
    std::memset(values, 0, num_rows * width * sizeof(float));
  }

  void copy(const State& from) {
    std::memcpy(largest, from.largest, num_rows * sizeof(float));
    std::memcpy(total, from.total, num_rows * sizeof(float));
    std::memcpy(values, from.values, num_rows * width * sizeof(float));
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

// most_rows: of those that go through a block of keys together; num_rows: of all.
template <typename T>
struct Buffers {
  using U = typename UnitOf<T>::type;
  static constexpr size_t kPerUnit = std::is_same<U, float>::value ? 1 : 2;

  size_t width, num_units;
  U *queries, *keys, *values, *weights;
  float *scores, *factors, *whole, *split;
  size_t num_floats;

  Buffers(float* scratch, int head_dim, size_t most_rows, size_t num_rows)
      : width(width_of(head_dim)), num_units(rounded_up(size_t(head_dim), kPerUnit * kWidth) / kPerUnit) {
    Carver carver(scratch);
    queries = carver.take<U>(num_rows * num_units);
    keys = carver.take<U>(num_units * kKeyBlock);
    values = carver.take<U>(kKeyBlock / kPerUnit * width);
    weights = carver.take<U>(most_rows * kKeyBlock / kPerUnit);
    scores = carver.take<float>(most_rows * kKeyBlock);
    factors = carver.take<float>(most_rows);
    whole = carver.take<float>(State::num_floats(num_rows, width));
    split = carver.take<float>(State::num_floats(num_rows, width));
    num_floats = carver.used();
  }
};

template <typename T>
size_t attention_scratch(int head_dim, int most_rows, int num_rows) {
  return Buffers<T>(nullptr, head_dim, size_t(most_rows), size_t(num_rows)).num_floats;
}

// Of 8-bit pages: the scale of each key of a block and of its value.
struct BlockScales {
  float keys[kKeyBlock], values[kKeyBlock];
};

inline V capped(V score, float softcap) {
  return multiply(all(softcap), tanh_of(divide(score, all(softcap))));
}

// Turns a row of scores into weights. seen: the columns [first, last) of num_columns, a multiple of kWidth, count. The
// state is that of the row; returns what its values so far are to be multiplied with. scales: of 8-bit pages.
template <bool kScaled, typename U>
inline float weigh(const Attention& attention, const BlockScales& scales, float* scores, U* weights, size_t first,
                   size_t last, size_t num_columns, float& largest, float& total) {
  const V scale = all(attention.scale);
  V top = all(kNothingSeen);
  for (size_t i = 0; i < num_columns; i += kWidth) {
    V score = load(scores + i);
    if constexpr (kScaled) score = multiply(score, load(scales.keys + i));
    score = multiply(score, scale);
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
      const V weight = exponential(subtract(load(scores + i), shift));
      const __m256bh halves = _mm512_cvtneps_pbh(kScaled ? multiply(weight, load(scales.values + i)) : weight);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(weights + i / 2), (__m256i)halves);
      sum = add(sum, kScaled ? weight : _mm512_cvtpbh_ps(halves));
    }
  } else
#endif
  {
    for (; i < num_columns; i += kWidth) {
      const V weight = exponential(subtract(load(scores + i), shift));
      store(weights + i, kScaled ? multiply(weight, load(scales.values + i)) : weight);
      sum = add(sum, weight);
    }
  }
  total = total * factor[0] + sum_of(sum);
  largest = new_largest;
  return factor[0];
}

// The output of a group of the part. L: how values were lifted.
template <typename T, typename L>
inline void write_output(const Attention& attention, const AttentionPart& part, const HeadGroup& group, const State& state) {
  for (size_t row = 0; row < state.num_rows; row++) {
    const V by = all(L::kBehind / state.total[row]);
    const float* values = state.values + row * state.width;
    const size_t token = row / size_t(group.size), place = row % size_t(group.size);
    T* to = static_cast<T*>(attention.out) + (part.row + int64_t(token)) * attention.out_stride +
            int64_t(group.heads[place]) * attention.head_dim;
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

// Positions of a part's keys: those that any token sees lie in [start, stop), the first block begins at `first`.
struct Span {
  int64_t start, stop, first;

  Span(const Attention& attention, const AttentionPart& part)
      : start(first_seen(part.position, attention.window)),
        stop(lesser(part.position + part.num_tokens, part.last_split * kSplit)),
        // The block of `start` or of the first split, whichever is later.
        first(greater(start / kKeyBlock * kKeyBlock, part.first_split * kSplit)) {}
};

// Where the keys and values of a block lie: of each position, in elements from the start of the caches. scales: the same
// for those of 8-bit pages.
struct Block {
  int64_t places[kKeyBlock], scales[kKeyBlock];
  size_t count;

  // At position `key`. What the span does not hold is not there; any place that it holds stands for that.
  void find(const Attention& attention, const AttentionPart& part, const Span& span, int64_t key) {
    count = size_t(lesser(span.stop - key, kKeyBlock));
    const size_t skipped = size_t(greater(span.start - key, 0));
    int64_t page = (key + int64_t(skipped)) / attention.page_size;
    int64_t slot = (key + int64_t(skipped)) % attention.page_size;
    for (size_t i = skipped; i < count; i++) {
      places[i] = part.pages[page] * attention.page_stride + slot * attention.slot_stride;
      scales[i] = part.pages[page] * attention.scales_stride + slot;
      if (++slot == attention.page_size) slot = 0, page++;
    }
    for (size_t i = 0; i < skipped; i++) places[i] = places[skipped], scales[i] = scales[skipped];
    for (size_t i = count; i < size_t(kKeyBlock); i++) places[i] = places[count - 1], scales[i] = scales[count - 1];
  }

  // Scales of a KV head, with what is missing behind scores, and what weights are lifted by.
  template <typename L>
  void find_scales(const Attention& attention, int kv_head, BlockScales& found) const {
    const int64_t head = int64_t(kv_head) * attention.page_size;
    const auto find = [&](float* to, const uint16_t* from, float by) {
      const BF16* const of_head = reinterpret_cast<const BF16*>(from) + head;
      for (size_t i = 0; i < size_t(kKeyBlock); i += kWidth) {
        V found;
        // Side by side: among fewer than a page's, a step to another page, or none, would show in the last.
        if (attention.page_size >= int64_t(kWidth) && scales[i + kWidth - 1] == scales[i] + int64_t(kWidth) - 1) {
          found = load(of_head + scales[i]);
        } else {
          BF16 each[kWidth];
          for (size_t j = 0; j < kWidth; j++) each[j] = of_head[scales[i + j]];
          found = load(each);
        }
        store(to + i, multiply(found, all(by)));
      }
    };
    find(found.keys, attention.key_scales, L::kBehind);
    find(found.values, attention.value_scales, L::kBefore);
  }

  // Brings those into the second cache.
  void fetch_scales(const Attention& attention, int kv_head) const {
    const int64_t head = int64_t(kv_head) * attention.page_size;
    for (size_t i = 0; i < count; i++) {
      if (i % 32 != 0 && scales[i] == scales[i - 1] + 1) continue;  // of the same line, or nearly
      __builtin_prefetch(attention.key_scales + head + scales[i], 0, 2);
      __builtin_prefetch(attention.value_scales + head + scales[i], 0, 2);
    }
  }
};

// Takes the keys of one block, from position `key` on, into the state of a group. C: what the pages hold.
template <typename T, typename C>
inline void attend_block(const Attention& attention, const AttentionPart& part, const HeadGroup& group,
                         const Buffers<T>& at, const typename Buffers<T>::U* queries, const Block& block, int64_t key,
                         const State& state, Fetch& next_keys, Fetch& next_values) {
  constexpr size_t kPerUnit = Buffers<T>::kPerUnit;
  constexpr bool kScaled = !std::is_same<T, C>::value;
  const size_t size = size_t(group.size), head_dim = size_t(attention.head_dim), count = block.count;
  const int64_t head = int64_t(group.kv_head) * attention.head_stride;
  // Rows that see any of these keys.
  const int64_t first_token = greater(key - part.position, 0);
  int64_t last_token = part.num_tokens;
  if (attention.window > 0) {
    last_token = lesser(last_token, key + int64_t(count) + attention.window - 1 - part.position);
  }
  const size_t first_row = size_t(first_token) * size, num_rows = size_t(last_token - first_token) * size;
  const size_t num_columns = rounded_up(count, kWidth);
  const auto* const keys = static_cast<const C*>(attention.keys) + head;
  const auto* const values = static_cast<const C*>(attention.values) + head;
  const auto* const query = queries + first_row * at.num_units;
  float* const sums = state.values + first_row * at.width;
  const bool direct = num_rows <= kMostDirectRows && head_dim % kDirectStep == 0;
  if (direct) {
    with_rows(num_rows, [&](auto rows) {
      direct_scores<kKeyBlock, rows.value>(query, at.num_units, keys, block.places, count, head_dim, at.scores,
                                             next_keys);
    });
  } else {
    pack_keys<kKeyBlock>(at.keys, keys, block.places, count, head_dim);
    product_all(query, at.num_units, at.keys, kKeyBlock, (head_dim + kPerUnit - 1) / kPerUnit, at.scores, kKeyBlock,
                nullptr, num_rows, num_columns);
  }
  BlockScales scales;
  if constexpr (kScaled) block.find_scales<LiftOf<T, C>>(attention, group.kv_head, scales);
  for (size_t row = 0; row < num_rows; row++) {
    const int64_t position = part.position + int64_t((first_row + row) / size);
    const int64_t first = greater(first_seen(position, attention.window) - key, 0);
    const int64_t last = lesser(position + 1 - key, int64_t(count));
    at.factors[row] = weigh<kScaled>(attention, scales, at.scores + row * kKeyBlock,
                                     at.weights + row * (kKeyBlock / kPerUnit), size_t(first), size_t(last), num_columns,
                                     state.largest[first_row + row], state.total[first_row + row]);
  }
  if (direct) {
    with_rows(num_rows, [&](auto rows) {
      direct_output<rows.value>(at.weights, kKeyBlock / kPerUnit, values, block.places, count, head_dim, sums, at.width,
                                  at.factors, next_values);
    });
  } else {
    pack_values(at.values, at.width, values, block.places, count, head_dim);
    product_all(at.weights, kKeyBlock / kPerUnit, at.values, at.width, (count + kPerUnit - 1) / kPerUnit, sums, at.width,
                at.factors, num_rows, at.width);
  }
}

// Calls each(group, its first row, its number of rows) for the groups of the part.
template <class Each>
inline void each_group(const AttentionPart& part, Each&& each) {
  size_t first_row = 0;
  for (int number = 0; number < part.num_groups; number++) {
    const HeadGroup& group = part.groups[number];
    const size_t num_rows = size_t(part.num_tokens) * size_t(group.size);
    each(group, first_row, num_rows);
    first_row += num_rows;
  }
}

template <typename T, typename C>
void attend(const Attention& attention, const AttentionPart& part, const AttentionPart* after, float* scratch) {
  size_t num_rows = 0, most_rows = 0;
  each_group(part, [&](const HeadGroup&, size_t, size_t of_group) {
    num_rows += of_group;
    most_rows = of_group > most_rows ? of_group : most_rows;
  });
  const Buffers<T> at(scratch, attention.head_dim, most_rows, num_rows);
  const Span span(attention, part);
  // Of the part's heads in a position.
  const int64_t first_head = int64_t(part.groups[0].kv_head) * attention.head_stride;
  const int64_t last_head = int64_t(part.groups[part.num_groups - 1].kv_head) * attention.head_stride;
  const C *first_key = static_cast<const C*>(attention.keys) + first_head;
  const C *first_value = static_cast<const C*>(attention.values) + first_head;
  const size_t num_bytes = size_t(last_head - first_head + attention.head_dim) * sizeof(C);
  Block blocks[2];
  blocks[0].find(attention, part, span, span.first);
  if (part.num_tokens == 1 && !part.fetched) {
    Fetch(first_key, blocks[0].places, blocks[0].count, num_bytes).rest();
    Fetch(first_value, blocks[0].places, blocks[0].count, num_bytes).rest();
  }
  each_group(part, [&](const HeadGroup& group, size_t first_row, size_t of_group) {
    for (size_t row = 0; row < of_group; row++) {
      const int64_t token = part.row + int64_t(row) / group.size;
      const T* query = static_cast<const T*>(attention.query) + token * attention.query_stride +
                       int64_t(group.heads[row % size_t(group.size)]) * attention.head_dim;
      pack_row<LiftOf<T, C>>(at.queries + (first_row + row) * at.num_units, query, size_t(attention.head_dim));
    }
  });
  State whole(at.whole, num_rows, at.width), split(at.split, num_rows, at.width);
  State* state = &whole;
  whole.clear();
  int64_t key = span.first;
  for (size_t turn = 0; key < span.stop; turn ^= 1) {
    const int64_t next = key + kKeyBlock;
    Block& later = blocks[turn ^ 1];
    Fetch next_keys, next_values;
    if (next < span.stop) {
      later.find(attention, part, span, next);
    } else if (after != nullptr) {
      const Span span_after(attention, *after);
      later.find(attention, *after, span_after, span_after.first);
    }
    if (next < span.stop || after != nullptr) {
      next_keys = Fetch(first_key, later.places, later.count, num_bytes);
      next_values = Fetch(first_value, later.places, later.count, num_bytes);
      if constexpr (!std::is_same<T, C>::value) {
        each_group(part, [&](const HeadGroup& group, size_t, size_t) { later.fetch_scales(attention, group.kv_head); });
      }
    }
    each_group(part, [&](const HeadGroup& group, size_t first_row, size_t of_group) {
      const auto* queries = at.queries + first_row * at.num_units;
      attend_block<T, C>(attention, part, group, at, queries, blocks[turn], key, state->rows(first_row, of_group), next_keys,
                   next_values);
    });
    next_keys.rest();
    next_values.rest();
    if (next % kSplit == 0 || next >= span.stop) {
      if (state == &split) whole.join(split);
      state = &split;
      split.clear();
    }
    key = next;
  }
  each_group(part, [&](const HeadGroup& group, size_t first_row, size_t of_group) {
    const State rows = whole.rows(first_row, of_group);
    if (part.partial == nullptr) {
      write_output<T, LiftOf<T, C>>(attention, part, group, rows);
    } else {
      State(part.partial + State::num_floats(first_row, at.width), of_group, at.width).copy(rows);
    }
  });
}

template <typename T, typename C>
void join_splits(const Attention& attention, const AttentionPart& part) {
  const size_t width = width_of(attention.head_dim);
  each_group(part, [&](const HeadGroup& group, size_t first_row, size_t num_rows) {
    float* at = part.partial + State::num_floats(first_row, width);
    State whole(at, num_rows, width);
    for (int64_t number = part.first_split + 1; number < part.last_split; number++) {
      whole.join(State(at += part.partial_stride, num_rows, width));
    }
    write_output<T, LiftOf<T, C>>(attention, part, group, whole);
  });
}

}  // namespace
}  // namespace phalanx
