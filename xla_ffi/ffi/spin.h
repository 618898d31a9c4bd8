// Waiting that is expected to be short, without going to sleep.
#pragma once

#include <chrono>

namespace ellm {

inline void pause_core() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// True as soon as done() is, false once `limit` has passed without.
template <class Done>
bool spin_until(const Done& done, std::chrono::nanoseconds limit) {
  constexpr int kLooksPerClock = 32;
  const auto end = std::chrono::steady_clock::now() + limit;
  do {
    for (int look = 0; look < kLooksPerClock; ++look) {
      if (done()) return true;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() < end);
  return done();
}

}  // namespace ellm
