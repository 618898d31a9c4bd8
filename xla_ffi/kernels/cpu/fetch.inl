// Memory into the level-2 cache.
#pragma once

#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

// Reads a byte of each line of the `bytes` bytes at `from`, one line after the other. That is as
// fast as memory goes; reading four rows at a time is half as fast, for the prefetchers lose track,
// and so are prefetch instructions.
static inline void fetch(const void* from, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  const volatile char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += kLineBytes) (void)at[i];
}

}  // namespace ellm::ELLM_ISA
