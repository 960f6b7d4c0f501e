#pragma once
#include <cstddef>

namespace phalanx {

// By the names that PyTorch gives them, in their order; `comm/shm_calls.py` and `kernels/native_cpu.py` count the
// same way.
enum DType : int { kBF16, kF16, kF32, kF64, kI32, kI64, kI8, kU8, kNumDTypes };

inline size_t item_bytes(int dtype) {
  constexpr size_t sizes[kNumDTypes] = {2, 2, 4, 8, 4, 8, 1, 1};
  return sizes[dtype];
}

}  // namespace phalanx
