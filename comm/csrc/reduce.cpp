#include "reduce.hpp"

namespace phalanx {

const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
      return kAvx512Kernels;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return kAvx2Kernels;
    return kPlainKernels;
  }();
  return chosen;
}

}  // namespace phalanx
