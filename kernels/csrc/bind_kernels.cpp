// The kernels room's part of `phalanx._native`. Tensors come as addresses: nothing here knows torch.
#include "bind_kernels.hpp"

#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace phalanx {

void bind_kernels(nb::module_& module) {
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  module.def("resize_pool", [](int num_threads) { Pool::instance().resize(num_threads); }, "num_threads"_a, unlocked);
  module.def("pool_size", [] { return Pool::instance().size(); });
  bind_operators(module);
}

}  // namespace phalanx
