#include "operators.hpp"

#include "instruction_sets.hpp"

namespace phalanx {

const std::vector<const Operators*>& usable_operators() {
  static const std::vector<const Operators*> usable =
      usable_of<Operators>(operators_avx512_bf16, operators_avx512, operators_avx2, operators_plain);
  return usable;
}

}  // namespace phalanx
