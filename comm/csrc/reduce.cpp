#include "reduce.hpp"

#include "instruction_sets.hpp"

namespace phalanx {

const std::vector<const Kernels*>& usable_kernels() {
  static const std::vector<const Kernels*> usable =
      usable_of<Kernels>(kAvx512Bf16Kernels, kAvx512Kernels, kAvx2Kernels, kPlainKernels);
  return usable;
}

}  // namespace phalanx
