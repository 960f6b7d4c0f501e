// The functions that an operator is made of, compiled once for each instruction set. Addresses of numbers are of the
// dtype that a table is asked for: kBF16, kF16 or kF32.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.hpp"

namespace phalanx {

constexpr int kNumFloats = 3;

// What pages of keys and values hold: numbers of the dtype beside them, or of 8 bits with a scale for each token's head
// (`pages.hpp`), bfloat16 [pages, heads, page_size]. `kernels/kv_format.py` counts the same way.
enum Pages : int { kPlain, kInt8, kFloat8, kNumPages };

// Bytes of a head of a token in pages.
inline size_t head_bytes(int pages, size_t head_dim, int dtype) {
  return pages == kPlain ? head_dim * item_bytes(dtype) : head_dim + sizeof(uint16_t);
}

// Of each row: normed = x / sqrt(mean(x^2) + eps) * weight, in float, rounded once. Rows of x lie x_stride apart.
using RmsNorm = void (*)(void* normed, const void* x, size_t x_stride, const void* weight, float eps, size_t num_rows,
                         size_t width);

// Of each row: sum = round(x + residual), written to `sum`, and its norm as above. `normed` may be `x`.
using AddRmsNorm = void (*)(void* normed, void* sum, const void* x, const void* residual, const void* weight,
                            float eps, size_t num_rows, size_t width);

// Of each row [gate, up] of 2 * width: activation(gate) * up, in float, rounded once.
using Gated = void (*)(void* out, const void* gate_up, size_t num_rows, size_t width);

// Queries and keys of each row [queries, keys, values] of `heads`, each of head_dim, are normalised (where norms are
// given) and turned by the row's cosines and sines, in place; keys and values are then written to the pages.
struct RopeWrite {
  void* heads;
  const void *cos, *sin;  // [rows, head_dim]
  const void *query_norm, *key_norm;  // or null
  float eps;
  void *keys, *values;                  // caches
  uint16_t *key_scales, *value_scales;  // theirs, or null
  const int64_t* slots;                 // one a row
  int64_t page_size, page_stride, slot_stride, head_stride;  // of the caches, in elements but the first
  size_t num_queries, num_keys, head_dim;
};
using RopeWriteRows = void (*)(const RopeWrite& work, size_t first_row, size_t last_row);

// What all parts of one attention have in common. Strides in elements.
struct Attention {
  const void *query, *keys, *values;
  const uint16_t *key_scales, *value_scales;  // of the caches, or null
  void* out;                                  // [T, heads, head_dim]
  int64_t query_stride, out_stride;
  int64_t page_size, page_stride, slot_stride, head_stride;  // of the caches
  int64_t scales_stride;                                     // of a page's scales
  int64_t window;                                            // positions seen, or 0 for all
  int head_dim;
  float scale, softcap;  // softcap: 0 for none
};

// The query heads of one KV head.
struct HeadGroup {
  const int32_t* heads;
  int size, kv_head;
};

// Some new tokens of one sequence, with the query heads of some KV heads, over some splits of the keys.
struct AttentionPart {
  const int64_t* pages;
  int64_t row, position;  // of the first token: in the step, in its sequence
  int num_tokens;
  const HeadGroup* groups;
  int num_groups;
  int64_t first_split, last_split;  // [first, last)
  // Where one split's states go, one group's after the other's, and how far from them the next split's; null where the
  // part is whole and writes its output.
  float* partial;
  size_t partial_stride;
  bool fetched;  // whether the first keys and values are on their way already
};

// Floats that `attend` needs at `scratch`: rows, that is query heads of tokens, of the largest group and of all.
using AttentionScratch = size_t (*)(int head_dim, int most_rows, int num_rows);
// Those of the partial states of so many rows.
using AttentionPartial = size_t (*)(int head_dim, int num_rows);
// after: what will be attended to next, if known, to be fetched meanwhile.
using Attend = void (*)(const Attention& attention, const AttentionPart& part, const AttentionPart* after, float* scratch);
// Joins the states of the part's splits, from part.partial on, and writes the output.
using JoinSplits = void (*)(const Attention& attention, const AttentionPart& part);

// Of a row's largest number, the first of equals; not-a-number is the largest. rank: see `select.hpp`.
struct Largest {
  uint32_t column;
  int32_t rank;
};
using ArgMax = Largest (*)(const void* row, size_t count);
// Writes the columns, from `first` on, whose rank (see `select.hpp`) is above `floor`; how many. Room for `count`.
using Above = size_t (*)(const float* row, size_t first, size_t count, int32_t floor, uint32_t* columns);

struct Operators {
  RmsNorm rms_norm[kNumFloats];
  AddRmsNorm add_rms_norm[kNumFloats];
  Gated silu_mul[kNumFloats];
  Gated gelu_mul[kNumFloats];
  RopeWriteRows rope_and_write_kv[kNumPages][kNumFloats];
  Attend attend[kNumPages][kNumFloats];
  JoinSplits join_splits[kNumPages][kNumFloats];
  AttentionScratch attention_scratch[kNumFloats];
  AttentionPartial attention_partial;
  ArgMax argmax[kNumFloats];
  Above above;
};

extern const Operators operators_plain, operators_avx2, operators_avx512, operators_avx512_bf16;

// Those of these that this processor can run, the best first.
const std::vector<const Operators*>& usable_operators();

inline const Operators& operators() {
  static const Operators& best = *usable_operators().front();
  return best;
}

}  // namespace phalanx
