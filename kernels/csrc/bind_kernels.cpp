// The kernels room's part of `phalanx._native`. Tensors come as addresses: nothing here knows torch.
#include "bind_kernels.hpp"

#include "linear.hpp"
#include "memory.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace phalanx {
namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// instructions: a place in `linear_sets`.
void multiply(uintptr_t y, uintptr_t x, size_t x_stride, uintptr_t packed, uintptr_t bias, size_t num_rows,
              size_t num_outputs, size_t num_inputs, size_t instructions) {
  linear(*usable_linears().at(instructions), at<uint16_t>(y), at<uint16_t>(x), x_stride, at<uint16_t>(packed),
         at<uint16_t>(bias), num_rows, num_outputs, num_inputs);
}

}  // namespace

void bind_kernels(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  module.def("resize_pool", [](int num_threads) { Pool::instance().resize(num_threads); }, "num_threads"_a, unlocked);
  module.def("pool_size", [] { return Pool::instance().size(); });
  bind_operators(module);
  module.def("linear", &multiply, "y"_a, "x"_a, "x_stride"_a, "packed"_a, "bias"_a, "num_rows"_a, "num_outputs"_a,
             "num_inputs"_a, "instructions"_a = 0, unlocked);
  module.def(
      "pack_weight",
      [](uintptr_t packed, uintptr_t rows, size_t first, size_t num_rows, size_t num_inputs) {
        pack_weight(at<uint16_t>(packed), at<uint16_t>(rows), first, num_rows, num_inputs);
      },
      "packed"_a, "rows"_a, "first"_a, "num_rows"_a, "num_inputs"_a, unlocked);
  module.def(
      "unpack_rows",
      [](uintptr_t out, uintptr_t packed, uintptr_t indices, size_t count, size_t num_outputs, size_t num_inputs) {
        unpack_rows(at<uint16_t>(out), at<uint16_t>(packed), at<int64_t>(indices), count, num_outputs, num_inputs);
      },
      "out"_a, "packed"_a, "indices"_a, "count"_a, "num_outputs"_a, "num_inputs"_a, unlocked);
  module.def(
      "advise_huge_pages",
      [](uintptr_t memory, size_t num_bytes) { return advise_huge_pages(at<char>(memory), num_bytes); }, "memory"_a,
      "num_bytes"_a, unlocked);
  module.def(
      "read_memory", [](uintptr_t memory, size_t num_bytes) { return read_memory(at<char>(memory), num_bytes); },
      "memory"_a, "num_bytes"_a, unlocked);
  nb::list sets;
  for (const LinearKernels* each : usable_linears()) sets.append(each->name);
  module.attr("linear_sets") = nb::tuple(sets);
}

}  // namespace phalanx
