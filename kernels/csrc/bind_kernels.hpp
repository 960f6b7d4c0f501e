#pragma once
#include <nanobind/nanobind.h>

namespace phalanx {

void bind_kernels(nanobind::module_& module);

}  // namespace phalanx
