// Paged attention of a step, cut into parts for the pool.
#pragma once
#include <cstdint>
#include <vector>

#include "operators.hpp"
#include "watch.hpp"

namespace phalanx {

constexpr int64_t kKeyBlock = 64;  // keys whose scores are computed together
constexpr int64_t kSplit = 256;    // keys that are computed apart from others; a multiple of kKeyBlock

// The first position that a token at `position` sees. Static: it is compiled for several instruction sets.
static inline int64_t first_seen(int64_t position, int64_t window) {
  return window > 0 && position >= window ? position - window + 1 : 0;
}

// The query heads of each KV head that has any.
class HeadLists {
 public:
  // kv_of_query: the KV head of each query head, below num_kv_heads.
  HeadLists(const std::vector<int>& kv_of_query, int num_kv_heads);
  HeadLists(const HeadLists&) = delete;
  HeadLists& operator=(const HeadLists&) = delete;

  const std::vector<HeadGroup>& groups() const { return groups_; }
  int num_heads() const { return int(heads_.size()); }
  int largest_group() const { return largest_; }

 private:
  std::vector<int32_t> heads_;
  std::vector<HeadGroup> groups_;  // of heads_
  int largest_ = 0;
};

// Of the last num_new of so many tokens of each sequence, one sequence after another: positions, then the slots (page *
// page_size + offset) in pages that the row `table` of `tables` names.
void token_places(int64_t* places, const int64_t* tables, int64_t table_stride, const std::vector<int64_t>& table,
                  const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t page_size);

// Who attends to what in a step; the same in every layer. Page tables are read where they are, so that they must stay.
class AttentionSteps {
 public:
  // tables: rows of page numbers, table_stride apart. table, num_new, lengths: of each sequence, which of those rows,
  // and how many tokens.
  AttentionSteps(const int64_t* tables, int64_t table_stride, const std::vector<int64_t>& table,
                 const std::vector<int64_t>& num_new, const std::vector<int64_t>& lengths, int64_t window);

  // dtype: of queries, output and, where they are kPlain, pages. attention: all but its window.
  void attend(Attention attention, const HeadLists& heads, int dtype, int pages, const Operators& operators) const;
  // Of that: keys and values once, queries and output; a product for each score and one for its value.
  Work work(const HeadLists& heads, size_t head_dim, int dtype, int pages) const;

 private:
  struct Sequence {
    const int64_t* pages;
    int64_t row, num_new, length;
  };
  std::vector<Sequence> sequences_;  // the longest work of one part first
  int64_t window_;

  std::vector<AttentionPart> parts(int64_t tokens_of_part) const;
};

}  // namespace phalanx
