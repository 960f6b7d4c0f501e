// `phalanx._native`: one extension, to which each room with C++ of its own adds its part.
#include <nanobind/nanobind.h>

#include "bind_kernels.hpp"
#include "bindings.hpp"

NB_MODULE(_native, module) {
  phalanx::bind_comm(module);
  phalanx::bind_kernels(module);
}
