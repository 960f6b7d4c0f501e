#include "attention.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "pool.hpp"
#include "scratch.hpp"

namespace phalanx {
namespace {

// Rows, that is query heads of tokens, that go through a block of keys together: packing it then costs a fiftieth of
// their products, and what they need stays in the second cache.
constexpr int kRows = 72;
// Parts below which splits are dealt out one by one, for each thread.
constexpr size_t kPartsPerThread = 4;
// Multiplications of a step, of scores and of values, that take as long as waking the threads.
constexpr double kSmall = 3e5;

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
  const int num_heads = heads.num_kv_heads(), most_rows = std::max(kRows, heads.largest_group());
  const std::vector<AttentionPart> whole = parts(std::max(1, kRows / std::max(1, heads.largest_group())));
  double work = 0;
  for (const AttentionPart& part : whole) {
    work += double(part.last_split - part.first_split) * kSplit * part.num_tokens * heads.start(num_heads) * attention.head_dim;
  }
  const size_t threads = size_t(Pool::instance().size()), enough = kPartsPerThread * threads;
  const bool small = threads == 1 || work < kSmall;
  const bool split = !small && whole.size() * size_t(num_heads) < enough;

  // Where there are few parts, each of their splits is one of its own, joined behind.
  std::vector<AttentionPart> pieces;
  size_t num_partial = 0;
  for (const AttentionPart& part : whole) {
    if (!split) {
      pieces.push_back(part);
      continue;
    }
    for (int64_t number = part.first_split; number < part.last_split; number++) {
      pieces.push_back(part);
      pieces.back().first_split = number;
      pieces.back().last_split = number + 1;
      num_partial += operators.attention_partial(attention.head_dim, part.num_tokens * heads.start(num_heads));
    }
  }
  thread_local std::vector<float> kept;
  if (kept.size() < num_partial) kept.resize(num_partial);
  float* partial = kept.data();
  if (split) {
    for (AttentionPart& piece : pieces) {
      piece.partial = partial;
      piece.partial_stride = operators.attention_partial(attention.head_dim, piece.num_tokens * heads.start(num_heads));
      partial += piece.partial_stride;
    }
  }

  auto with_head = [&](AttentionPart part, int kv_head) {
    part.heads = heads.heads(kv_head);
    part.group = heads.group(kv_head);
    part.kv_head = kv_head;
    if (split) part.partial += operators.attention_partial(attention.head_dim, part.num_tokens * heads.start(kv_head));
    return part;
  };
  const Attend attend = operators.attend[dtype];
  const size_t num_scratch = operators.attention_scratch[dtype](attention.head_dim, most_rows);
  auto run = [&](const AttentionPart& piece, int first_head, int last_head) {
    float* const room = scratch<float>(num_scratch);
    for (int head = first_head; head < last_head; head++) {
      if (heads.group(head) > 0) attend(attention, with_head(piece, head), room);
    }
  };
  if (small) {
    for (const AttentionPart& piece : pieces) run(piece, 0, num_heads);
    return;
  }
  // As many heads together as leave enough for the threads: heads lie side by side, on the same pages of memory.
  const int together = int(std::clamp(pieces.size() * size_t(num_heads) / enough, size_t(1), size_t(num_heads)));
  const int num_turns = (num_heads + together - 1) / together;
  parallel_for(int(pieces.size()) * num_turns, [&](int index) {
    const int first = index % num_turns * together;
    run(pieces[size_t(index / num_turns)], first, std::min(first + together, num_heads));
  });
  if (!split) return;
  const AttentionPart* piece = pieces.data();
  for (AttentionPart part : whole) {
    part.partial = piece->partial;
    part.partial_stride = piece->partial_stride;
    for (int head = 0; head < num_heads; head++) {
      if (heads.group(head) > 0) operators.join_splits[dtype](attention, with_head(part, head));
    }
    piece += part.last_split - part.first_split;
  }
}

}  // namespace phalanx
