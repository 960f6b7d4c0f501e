#pragma once
#include <nanobind/nanobind.h>

namespace phalanx {

void bind_kernels(nanobind::module_& module);
void bind_operators(nanobind::module_& module);

}  // namespace phalanx
