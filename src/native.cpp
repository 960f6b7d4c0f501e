// `phalanx._native`: one extension, to which each room with C++ of its own adds its part.
#include <nanobind/nanobind.h>

#include "bind_kernels.hpp"
#include "bindings.hpp"

NB_MODULE(_native, module) {
  nanobind::set_leak_warnings(false);  // of what a script still holds when the interpreter ends
  phalanx::bind_comm(module);
  phalanx::bind_kernels(module);
}
