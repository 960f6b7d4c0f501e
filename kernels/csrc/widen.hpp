// bfloat16 as float32.
#pragma once
#include <cstddef>
#include <cstdint>

namespace phalanx {

/// out[i] = x[i] for i in [0, count), over the threads of the pool where there is enough to do.
void widen(float* out, const uint16_t* x, size_t count);

}  // namespace phalanx
