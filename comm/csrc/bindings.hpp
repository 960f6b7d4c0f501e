#pragma once
#include <nanobind/nanobind.h>

namespace phalanx {

void bind_comm(nanobind::module_& module);

}  // namespace phalanx
