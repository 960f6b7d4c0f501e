#include "attention.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "pool.hpp"

namespace phalanx {
namespace {

// Rows, that is query heads of tokens, that go through a block of keys together: packing it then costs a fiftieth of
// their products, and what they need stays in the second cache.
constexpr int kRows = 72;
// Parts below which splits are dealt out one by one, for each thread.
constexpr size_t kPartsPerThread = 4;
// Multiplications of a step, of scores and of values, that take as long as waking the threads.
constexpr double kSmall = 3e5;

// Floats at a cache line, kept by a thread from call to call.
float* scratch_of(size_t num_floats) {
  struct Free {
    void operator()(float* at) const { std::free(at); }
  };
  thread_local std::unique_ptr<float, Free> kept;
  thread_local size_t size = 0;
  if (num_floats > size) {
    kept.reset();
    size = 0;
    kept.reset(static_cast<float*>(std::aligned_alloc(64, (num_floats * sizeof(float) + 63) / 64 * 64)));
    if (kept == nullptr) throw std::bad_alloc();
    size = num_floats;
  }
  return kept.get();
}

}  // namespace

HeadLists::HeadLists(const std::vector<int>& kv_of_query, int num_kv_heads) {
  for (int kv_head = 0; kv_head < num_kv_heads; kv_head++) {
    starts_.push_back(int(heads_.size()));
    for (size_t head = 0; head < kv_of_query.size(); head++) {
      if (kv_of_query[head] == kv_head) heads_.push_back(int32_t(head));
    }
    largest_ = std::max(largest_, int(heads_.size()) - starts_.back());
  }
  starts_.push_back(int(heads_.size()));
}

AttentionSteps::AttentionSteps(const int64_t* tables, int64_t table_stride, const std::vector<int64_t>& num_new,
                               const std::vector<int64_t>& lengths, int64_t window)
    : window_(window) {
  int64_t row = 0;
  for (size_t i = 0; i < num_new.size(); i++) {
    sequences_.push_back({tables + int64_t(i) * table_stride, row, num_new[i], lengths[i]});
    row += num_new[i];
  }
  std::stable_sort(sequences_.begin(), sequences_.end(), [](const Sequence& a, const Sequence& b) {
    const bool a_many = a.num_new > 1, b_many = b.num_new > 1;
    return a_many != b_many ? a_many : a.length > b.length;
  });
}

// Later tokens of a sequence first, for they see more.
std::vector<AttentionPart> AttentionSteps::parts(int64_t tokens_of_part) const {
  std::vector<AttentionPart> found;
  for (const Sequence& sequence : sequences_) {
    const int64_t before = sequence.length - sequence.num_new;
    for (int64_t left = sequence.num_new; left > 0;) {
      const int64_t first = (left - 1) / tokens_of_part * tokens_of_part;
      AttentionPart part{};
      part.pages = sequence.pages;
      part.row = sequence.row + first;
      part.position = before + first;
      part.num_tokens = int(left - first);
      part.first_split = first_seen(part.position, window_) / kSplit;
      part.last_split = (before + left + kSplit - 1) / kSplit;
      found.push_back(part);
      left = first;
    }
  }
  return found;
}

void AttentionSteps::attend(Attention attention, const HeadLists& heads, int dtype, const Operators& operators) const {
  attention.window = window_;
  std::vector<AttentionPart> parts;
  double work = 0;
  const int64_t tokens = std::max(1, kRows / std::max(1, heads.largest_group()));
  for (const AttentionPart& rows : this->parts(tokens)) {
    for (int kv_head = 0; kv_head < heads.num_kv_heads(); kv_head++) {
      if (heads.group(kv_head) == 0) continue;
      AttentionPart part = rows;
      part.heads = heads.heads(kv_head);
      part.group = heads.group(kv_head);
      part.kv_head = kv_head;
      parts.push_back(part);
      work += double(part.last_split - part.first_split) * kSplit * part.num_tokens * part.group * attention.head_dim;
    }
  }
  const Attend attend = operators.attend[dtype];
  const size_t num_scratch = operators.attention_scratch[dtype](attention.head_dim, int(tokens) * heads.largest_group());
  auto run = [&](const AttentionPart& part) { attend(attention, part, scratch_of(num_scratch)); };
  Pool& pool = Pool::instance();
  if (pool.size() == 1 || work < kSmall) {
    for (const AttentionPart& part : parts) run(part);
    return;
  }
  if (parts.size() >= kPartsPerThread * size_t(pool.size())) {
    parallel_for(int(parts.size()), [&](int index) { run(parts[size_t(index)]); });
    return;
  }
  // Few parts: each of their splits is one of its own, joined behind.
  std::vector<AttentionPart> pieces;
  std::vector<size_t> offsets;
  size_t num_partial = 0;
  for (const AttentionPart& part : parts) {
    const size_t size = operators.attention_partial(attention.head_dim, part.num_tokens * part.group);
    for (int64_t number = part.first_split; number < part.last_split; number++) {
      AttentionPart piece = part;
      piece.first_split = number;
      piece.last_split = number + 1;
      pieces.push_back(piece);
      offsets.push_back(num_partial);
      num_partial += size;
    }
  }
  thread_local std::vector<float> partials;
  if (partials.size() < num_partial) partials.resize(num_partial);
  float* const base = partials.data();
  for (size_t i = 0; i < pieces.size(); i++) pieces[i].partial = base + offsets[i];
  parallel_for(int(pieces.size()), [&](int index) { run(pieces[size_t(index)]); });
  size_t piece = 0;
  for (AttentionPart& part : parts) {
    part.partial = pieces[piece].partial;
    piece += size_t(part.last_split - part.first_split);
    operators.join_splits[dtype](attention, part);
  }
}

}  // namespace phalanx
