#pragma once
#include <cstddef>
#include <cstdint>

namespace phalanx {

/// Asks for huge pages behind memory that nobody has written to yet; whether the system will try.
bool advise_huge_pages(void* memory, size_t num_bytes);

/// Reads memory over the threads of the pool, as fast as it goes: what products are measured against. Returns the sum of
/// its 64-bit words, the last filled up with zeros.
uint64_t read_memory(const void* memory, size_t num_bytes);

}  // namespace phalanx
