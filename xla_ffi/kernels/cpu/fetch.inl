// Memory into the level-2 cache, at once or beside other work.
#pragma once

#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

constexpr int64_t kLineBytes = 64;

// Reads a byte of each line of the `bytes` bytes at `from`, one line after the other. That is as
// fast as memory goes; reading four rows at a time is half as fast, for the prefetchers lose track,
// and so are prefetch instructions.
static inline void fetch(const void* from, int64_t bytes) {
  const volatile char* at = static_cast<const char*>(from);
  for (int64_t i = 0; i < bytes; i += kLineBytes) (void)at[i];
}

// Lines to ask for, one after the other.
struct Lines {
  const char* at = nullptr;
  int64_t left = 0;

  inline void ask(int64_t count) {
    for (int64_t i = min_of(count, left); i > 0; --i, --left, at += kLineBytes) {
      __builtin_prefetch(at, 0, 2);
    }
  }

  template <int Count>
  inline void ask() {
    if (left <= 0) return;
#pragma GCC unroll 4
    for (int i = 0; i < Count; ++i) __builtin_prefetch(at + i * kLineBytes, 0, 3);
    at += Count * kLineBytes;
    left -= Count;
  }
};

// Shares a stretch of memory out among the calls that ask for it.
class LinesAhead {
 public:
  LinesAhead() = default;
  LinesAhead(const void* from, int64_t bytes, int64_t calls)
      : at_(static_cast<const char*>(from)), left_((bytes + kLineBytes - 1) / kLineBytes) {
    each_ = (left_ + calls - 1) / calls;
  }

  inline Lines take() {
    const Lines lines = {at_, min_of(each_, left_)};
    at_ += lines.left * kLineBytes;
    left_ -= lines.left;
    return lines;
  }

 private:
  const char* at_ = nullptr;
  int64_t left_ = 0;
  int64_t each_ = 0;
};

}  // namespace ellm::ELLM_ISA
