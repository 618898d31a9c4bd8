// Units of work in an order that memory likes.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>

#include "kernels/cpu/parallel.h"

namespace ellm {

// A unit of work, and its thread's way through them.
struct RangeUnit {
  int64_t index;
  int64_t next;  // what the thread is likely to take next, or `index` at its range's end
  bool goes_on;  // it took the unit before this one too
};

// body(unit) once for every unit in [0, units) on up to `threads` threads. Each begins at its own
// place and goes on from there, so that what it reads is one stream, and then helps those behind.
inline void parallel_ranges(const ParallelFor& parallel, int64_t threads, int64_t units,
                            const std::function<void(const RangeUnit& unit)>& body) {
  const int64_t ranges = std::max<int64_t>(1, std::min(threads, units));
  const auto next = std::make_unique<std::atomic<int64_t>[]>(ranges);
  const auto begin = [&](int64_t range) { return units * range / ranges; };
  for (int64_t r = 0; r < ranges; ++r) next[r] = begin(r);
  parallel(ranges, [&](int64_t first) {
    for (int64_t r = first; r < first + ranges; ++r) {
      std::atomic<int64_t>& at = next[r % ranges];
      const int64_t end = begin(r % ranges + 1);
      int64_t last = -2;
      for (int64_t unit = at.fetch_add(1); unit < end; unit = at.fetch_add(1)) {
        body({unit, std::min(unit + 1, end - 1), unit == last + 1});
        last = unit;
      }
    }
  });
}

}  // namespace ellm
