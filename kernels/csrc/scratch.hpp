// Memory that a thread keeps from one call of an operator to the next.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>

namespace phalanx {

// At least so many, from a cache line on; good until the thread's next call for that type.
template <class T>
T* scratch(size_t count) {
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t held = 0;
  if (count > held) {
    memory.reset();
    held = 0;
    memory.reset(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
    if (!memory) throw std::bad_alloc();
    held = count;
  }
  return static_cast<T*>(memory.get());
}

}  // namespace phalanx
