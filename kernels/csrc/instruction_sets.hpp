#pragma once
#include <vector>

namespace phalanx {

// Those of the tables of functions that this processor can run, the best first.
template <typename Table>
std::vector<const Table*> usable_of(const Table& avx512_bf16, const Table& avx512, const Table& avx2,
                                    const Table& plain) {
  __builtin_cpu_init();
  std::vector<const Table*> found;
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  // VBMI, which nearly all of these have, looks integers of 8 bits up as bfloat16; VNNI multiplies them.
  if (has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
      __builtin_cpu_supports("avx512vnni")) {
    found.push_back(&avx512_bf16);
  }
  if (has_avx512) found.push_back(&avx512);
  if (has_avx2) found.push_back(&avx2);
  found.push_back(&plain);
  return found;
}

}  // namespace phalanx
