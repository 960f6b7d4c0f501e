// The largest numbers of rows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "operators.hpp"

namespace phalanx {

// Orders as the numbers do; both zeros are equal, and not-a-number is above all. Static: it is compiled for several
// instruction sets.
static inline int32_t rank_of(float number) {
  if (number != number) return INT32_MAX;
  number += 0.0f;
  int32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits ^ int32_t(uint32_t(bits >> 31) >> 1);
}

// [num_rows, width], one row behind the other. dtype: kBF16, kF16 or kF32.
struct Rows {
  const void* numbers;
  size_t num_rows;
  size_t width;
  int dtype;
};

// columns [num_rows]: of each row's largest number, the first of equals.
void argmax_rows(int64_t* columns, const Rows& x, const Operators& operators);

// keys [num_rows]: of each row's largest number, whose order is that of the numbers, and of equals the first is larger;
// their lower 32 bits, inverted, are its column, counted from `first` on.
void argmax_keys(int64_t* keys, const Rows& x, int64_t first, const Operators& operators);

// values, columns [num_rows, count]: the `count` largest of each row, largest first, equal ones in order of their columns.
void top_rows(float* values, int64_t* columns, const float* x, size_t num_rows, size_t width, size_t count,
              const Operators& operators);

}  // namespace phalanx
