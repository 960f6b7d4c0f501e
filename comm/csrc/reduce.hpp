// Sums and maxima of what several ranks hold.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "dtype.hpp"

namespace phalanx {

// out = in[0] + in[1] + ..., in this order; bfloat16 and float16 are added in float and rounded once. `out` may be any
// of the inputs: an element is read from all of them before it is written.
using Combine = void (*)(void* out, const void* const* in, int num_in, size_t count);

// The functions of one instruction set, by DType.
struct Kernels {
  const char* name;
  Combine sum[kNumDTypes];
  Combine max[kNumDTypes];
};

extern const Kernels kPlainKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;

// Those of these that this processor can run, the best first. All give the same bits.
const std::vector<const Kernels*>& usable_kernels();

inline const Kernels& kernels() {
  static const Kernels& best = *usable_kernels().front();
  return best;
}

}  // namespace phalanx
