// Cosines and sines of rotary position embedding.
#pragma once
#include <cstddef>
#include <cstdint>

namespace phalanx {

/// cos, sin [num_rows, 2 * half], both halves alike, of the angles position * frequency in float. dtype: kBF16 or kF32, to
/// which they are rounded.
void rope_table(void* cos, void* sin, const int64_t* positions, const float* frequencies, size_t num_rows, size_t half,
                int dtype);

}  // namespace phalanx
