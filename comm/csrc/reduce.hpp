// Sums and maxima of what several ranks hold, and the normalisation that may follow a sum.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace phalanx {

// By the names that PyTorch gives them, in their order; `shm.py` counts the same way.
enum DType : int { kBF16, kF16, kF32, kF64, kI32, kI64, kI8, kU8, kNumDTypes };

inline size_t item_bytes(int dtype) {
  constexpr size_t sizes[kNumDTypes] = {2, 2, 4, 8, 4, 8, 1, 1};
  return sizes[dtype];
}

// out = in[0] + in[1] + ..., in this order; bfloat16 and float16 are added in float and rounded once. `out` may be any
// of the inputs: an element is read from all of them before it is written.
using Combine = void (*)(void* out, const void* const* in, int num_in, size_t count);

// Of each row: sum = round(x + residual), written to `sum`; normed = sum / sqrt(mean(sum^2) + eps) * weight, in float,
// rounded once. `normed` may be `x`. For kBF16, kF16 and kF32.
using AddRmsNorm = void (*)(void* normed, void* sum, const void* x, const void* residual, const void* weight,
                            float eps, size_t num_rows, size_t width);

// The functions of one instruction set, by DType.
struct Kernels {
  const char* name;
  Combine sum[kNumDTypes];
  Combine max[kNumDTypes];
  AddRmsNorm add_rms_norm[3];
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
