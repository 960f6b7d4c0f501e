#include "select.hpp"

#include <algorithm>
#include <vector>

#include "dtype.hpp"
#include "pool.hpp"

namespace phalanx {
namespace {

// Numbers searched in about the time that it takes to wake the threads.
constexpr size_t kSmall = 32768;
// Of a row, searched one after another by one thread.
constexpr size_t kPiece = 8192;

// Ordered from best to last: by falling rank, then by rising column.
uint64_t place_of(int32_t rank, uint32_t column) {
  const uint32_t falling = ~(uint32_t(rank) ^ 0x80000000u);
  return uint64_t(falling) << 32 | column;
}
int32_t rank_at(uint64_t place) { return int32_t(~uint32_t(place >> 32) ^ 0x80000000u); }
uint32_t column_at(uint64_t place) { return uint32_t(place); }

template <class F>
void over(size_t count, bool small, F&& body) {
  if (small || count == 1) {
    for (size_t i = 0; i < count; i++) body(int(i));
  } else {
    parallel_for(int(count), [&](int index) { body(index); });
  }
}

void top_of(float* values, int64_t* columns, const float* row, size_t width, size_t count, const Operators& operators) {
  // Of the first piece: twice as many as are wanted, and then some.
  const size_t room = 2 * count + 256;
  thread_local std::vector<uint64_t> places;
  thread_local std::vector<uint32_t> found;
  places.clear();
  found.resize(kPiece);
  // Columns come in rising order: a later one equal to the last that belongs does not.
  int32_t floor = INT32_MIN;
  auto sort_out = [&] {
    if (places.size() <= count) return;
    std::nth_element(places.begin(), places.begin() + ptrdiff_t(count) - 1, places.end());
    places.resize(count);
    floor = rank_at(places.back());
  };
  for (size_t start = 0; start < width;) {
    // What is found in a piece are those that would belong by all before it: a few of as many again, most of more.
    const size_t stop = std::min(width, start + std::min(std::max(room, 2 * start), kPiece));
    const size_t num_found = operators.above(row, start, stop, floor, found.data());
    for (size_t i = 0; i < num_found; i++) places.push_back(place_of(rank_of(row[found[i]]), found[i]));
    sort_out();
    start = stop;
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 0; i < count; i++) {
    columns[i] = column_at(places[i]);
    values[i] = row[column_at(places[i])];
  }
}

// Calls found(row, place) for the best of each row.
template <class F>
void each_best(const Rows& x, const Operators& operators, F&& found) {
  const auto [numbers, num_rows, width, dtype] = x;
  const bool small = num_rows * width <= kSmall;
  const size_t num_pieces = small ? 1 : (width + kPiece - 1) / kPiece;
  thread_local std::vector<uint64_t> kept;
  std::vector<uint64_t>& best = kept;  // of the caller, whichever thread writes to it
  best.resize(num_rows * num_pieces);
  const char* const begin = static_cast<const char*>(numbers);
  const size_t item = item_bytes(dtype);
  over(num_rows * num_pieces, small, [&, width = width, argmax = operators.argmax[dtype]](int index) {
    const size_t row = size_t(index) / num_pieces, start = size_t(index) % num_pieces * kPiece;
    const size_t count = num_pieces == 1 ? width : std::min(kPiece, width - start);
    const Largest largest = argmax(begin + (row * width + start) * item, count);
    best[size_t(index)] = place_of(largest.rank, uint32_t(start) + largest.column);
  });
  for (size_t row = 0; row < num_rows; row++) {
    const uint64_t* pieces = best.data() + row * num_pieces;
    found(row, *std::min_element(pieces, pieces + num_pieces));
  }
}

}  // namespace

void argmax_rows(int64_t* columns, const Rows& x, const Operators& operators) {
  each_best(x, operators, [&](size_t row, uint64_t place) { columns[row] = column_at(place); });
}

void argmax_keys(int64_t* keys, const Rows& x, int64_t first, const Operators& operators) {
  each_best(x, operators, [&](size_t row, uint64_t place) {
    const uint32_t column = uint32_t(first) + column_at(place);
    keys[row] = int64_t(uint64_t(rank_at(place)) << 32 | uint32_t(~column));
  });
}

void top_rows(float* values, int64_t* columns, const float* x, size_t num_rows, size_t width, size_t count,
              const Operators& operators) {
  over(num_rows, num_rows * width <= kSmall, [&](int row) {
    const size_t at = size_t(row);
    top_of(values + at * count, columns + at * count, x + at * width, width, count, operators);
  });
}

}  // namespace phalanx
