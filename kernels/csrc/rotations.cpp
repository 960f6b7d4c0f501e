#include "rotations.hpp"

#include <cmath>
#include <cstring>
#include <stdexcept>

#include "dtype.hpp"

namespace phalanx {
namespace {

// To the nearest, ties to even; of a number that is one.
uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

template <class T, class Round>
void fill(T* cos, T* sin, const int64_t* positions, const float* frequencies, size_t num_rows, size_t half, Round round) {
  for (size_t row = 0; row < num_rows; row++, cos += 2 * half, sin += 2 * half) {
    const float position = float(positions[row]);
    for (size_t i = 0; i < half; i++) {
      const float angle = position * frequencies[i];
      cos[i] = cos[half + i] = round(std::cos(angle));
      sin[i] = sin[half + i] = round(std::sin(angle));
    }
  }
}

}  // namespace

void rope_table(void* cos, void* sin, const int64_t* positions, const float* frequencies, size_t num_rows, size_t half,
                int dtype) {
  if (dtype == kBF16) {
    fill(static_cast<uint16_t*>(cos), static_cast<uint16_t*>(sin), positions, frequencies, num_rows, half, rounded);
  } else if (dtype == kF32) {
    fill(static_cast<float*>(cos), static_cast<float*>(sin), positions, frequencies, num_rows, half,
         [](float value) { return value; });
  } else {
    throw std::invalid_argument("rope_table is made in bfloat16 and float32");
  }
}

}  // namespace phalanx
