#include "attention.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <numeric>

#include "pool.hpp"
#include "scratch.hpp"

namespace phalanx {
namespace {

// Rows, that is query heads of tokens, that go through a block of keys together: packing it then costs a fiftieth of
// their products, and what they need stays in the second cache.
constexpr int kRows = 72;
// Parts below which splits are dealt out one by one, for each thread.
constexpr size_t kPartsPerThread = 4;
// Multiplications of scores in a step from which on the threads gain more than they take to begin. Keys and values of a
// single sequence lie beyond the caches, so that it is memory they are waited for.
constexpr double kSmall = 3e4;

}  // namespace

HeadLists::HeadLists(const std::vector<int>& kv_of_query, int num_kv_heads) {
  heads_.reserve(kv_of_query.size());
  for (int kv_head = 0; kv_head < num_kv_heads; kv_head++) {
    const int32_t* first = heads_.data() + heads_.size();
    for (size_t head = 0; head < kv_of_query.size(); head++) {
      if (kv_of_query[head] == kv_head) heads_.push_back(int32_t(head));
    }
    const int size = int(heads_.data() + heads_.size() - first);
    if (size > 0) groups_.push_back({first, size, kv_head});
    largest_ = std::max(largest_, size);
  }
}

void token_places(int64_t* places, const int64_t* tables, int64_t table_stride, const std::vector<int64_t>& table,
                  const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t page_size) {
  int64_t* slots = places + std::accumulate(num_new.begin(), num_new.end(), int64_t(0));
  for (size_t i = 0; i < num_new.size(); i++) {
    const int64_t* const pages = tables + table[i] * table_stride;
    for (int64_t position = lengths[i] - num_new[i]; position < lengths[i]; position++) {
      *places++ = position;
      *slots++ = pages[position / page_size] * page_size + position % page_size;
    }
  }
}

AttentionSteps::AttentionSteps(const int64_t* tables, int64_t table_stride, const std::vector<int64_t>& table,
                               const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t window)
    : window_(window) {
  int64_t row = 0;
  for (size_t i = 0; i < num_new.size(); i++) {
    sequences_.push_back({tables + table[i] * table_stride, row, num_new[i], lengths[i]});
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

Work AttentionSteps::work(const HeadLists& heads, size_t head_dim, int dtype, int pages) const {
  size_t num_new = 0, num_read = 0, num_pairs = 0;  // tokens, positions, scores of a head
  for (const Sequence& sequence : sequences_) {
    const int64_t before = sequence.length - sequence.num_new;
    num_new += sequence.num_new;
    num_read += sequence.length - first_seen(before, window_);
    for (int64_t position = before; position < sequence.length; position++) {
      num_pairs += position + 1 - first_seen(position, window_);
    }
  }
  const size_t num_queries = heads.num_heads(), num_keys = heads.groups().size();
  const size_t read = num_read * num_keys * head_bytes(pages, head_dim, dtype);
  const size_t moved = num_new * num_queries * head_dim * item_bytes(dtype);
  return {"paged_attention", {num_new, num_read}, 2.0 * (read + moved), 4.0 * num_pairs * num_queries * head_dim};
}

void AttentionSteps::attend(Attention attention, const HeadLists& heads, int dtype, int pages,
                            const Operators& operators) const {
  attention.window = window_;
  const HeadGroup* const groups = heads.groups().data();
  const int num_groups = int(heads.groups().size()), num_heads = heads.num_heads();
  const std::vector<AttentionPart> whole = parts(std::max(1, kRows / std::max(1, heads.largest_group())));
  double work = 0;
  int64_t most_splits = 0;
  for (const AttentionPart& part : whole) {
    const int64_t num_keys = part.position + part.num_tokens - first_seen(part.position, window_);
    work += double(num_keys) * part.num_tokens * num_heads * attention.head_dim;
    most_splits = std::max(most_splits, part.last_split - part.first_split);
  }
  const size_t threads = size_t(Pool::instance().size()), enough = kPartsPerThread * threads;
  const bool small = threads == 1 || work < kSmall;
  const bool split = !small && most_splits > 1 && whole.size() * size_t(num_groups) < enough;

  // Where there are few parts, each of their splits is one of its own, joined behind.
  std::vector<AttentionPart> pieces;
  size_t num_partial = 0;
  for (AttentionPart part : whole) {
    part.groups = groups;
    part.num_groups = num_groups;
    if (!split) {
      pieces.push_back(part);
      continue;
    }
    part.partial_stride = operators.attention_partial(attention.head_dim, part.num_tokens * num_heads);
    for (int64_t number = part.first_split; number < part.last_split; number++) {
      pieces.push_back(part);
      pieces.back().first_split = number;
      pieces.back().last_split = number + 1;
      num_partial += part.partial_stride;
    }
  }
  thread_local std::vector<float> kept;
  if (kept.size() < num_partial) kept.resize(num_partial);
  float* partial = kept.data();
  if (split) {
    for (AttentionPart& piece : pieces) {
      piece.partial = partial;
      partial += piece.partial_stride;
    }
  }

  const Attend attend = operators.attend[pages][dtype];
  const AttentionScratch num_scratch = operators.attention_scratch[dtype];
  const auto with_groups = [&](AttentionPart piece, int first_group, int last_group) {
    int before = 0;
    for (int group = 0; group < first_group; group++) before += groups[group].size;
    piece.groups = groups + first_group;
    piece.num_groups = last_group - first_group;
    if (split) piece.partial += operators.attention_partial(attention.head_dim, piece.num_tokens * before);
    return piece;
  };
  const auto run = [&](const AttentionPart& piece, const AttentionPart* after) {
    int num_rows = 0;
    for (int group = 0; group < piece.num_groups; group++) num_rows += piece.num_tokens * piece.groups[group].size;
    const int most_rows = std::min(num_rows, piece.num_tokens * heads.largest_group());
    attend(attention, piece, after, scratch<float>(num_scratch(attention.head_dim, most_rows, num_rows)));
  };
  // Pieces of several tokens go to the threads one by one, and a head after the other: what it computes with then stays
  // in the second cache. Of single tokens, keys and values are read in the order of memory, where the heads of a
  // position lie side by side, and so many pieces one after the other as leave enough for the threads: what is first
  // read of one is on its way while the one before is computed.
  const auto is_single = [](const AttentionPart& piece) { return piece.num_tokens == 1; };
  const size_t num_many = size_t(std::find_if(pieces.begin(), pieces.end(), is_single) - pieces.begin());
  const size_t num_singles = pieces.size() - num_many;
  const size_t all = size_t(num_groups);
  const size_t at_once = small ? all : std::clamp(pieces.size() * all / enough, size_t(1), all);
  const size_t turns = (all + at_once - 1) / at_once;
  const size_t in_a_row = small ? std::max(num_singles, size_t(1)) : std::max(num_singles * turns / enough, size_t(1));
  const size_t num_runs = (num_singles + in_a_row - 1) / in_a_row;
  const auto task = [&](size_t index) {
    const int first = int(index % turns * at_once), last = std::min(first + int(at_once), num_groups);
    size_t piece = index / turns;
    if (piece < num_many) {
      for (int group = first; group < last; group++) run(with_groups(pieces[piece], group, group + 1), nullptr);
      return;
    }
    piece = num_many + (piece - num_many) * in_a_row;
    const size_t stop = std::min(piece + in_a_row, pieces.size());
    AttentionPart now = with_groups(pieces[piece], first, last);
    for (; piece < stop; piece++) {
      if (piece + 1 == stop) return run(now, nullptr);
      AttentionPart after = with_groups(pieces[piece + 1], first, last);
      run(now, &after);
      after.fetched = true;
      now = after;
    }
  };
  const size_t num_tasks = (num_many + num_runs) * turns;
  if (small) {
    for (size_t index = 0; index < num_tasks; index++) task(index);
  } else {
    parallel_for(int(num_tasks), [&](int index) { task(size_t(index)); });
  }
  if (!split) return;
  const AttentionPart* piece = pieces.data();
  for (const AttentionPart& part : whole) {
    AttentionPart joined = *piece;
    joined.last_split = part.last_split;
    operators.join_splits[pages][dtype](attention, joined);
    piece += part.last_split - part.first_split;
  }
}

}  // namespace phalanx
