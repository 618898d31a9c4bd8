// How a kernel runs its units of work: the caller brings the threads (XLA's pool in the engine,
// plain threads in tests).
#pragma once

#include <cstdint>
#include <functional>

namespace ellm {

// Calls body(i) once for every i in [0, units), on any thread and in any order, and returns when
// all are done.
using ParallelFor =
    std::function<void(int64_t units, const std::function<void(int64_t unit)>& body)>;

inline void run_serially(int64_t units, const std::function<void(int64_t)>& body) {
  for (int64_t i = 0; i < units; ++i) body(i);
}

}  // namespace ellm
