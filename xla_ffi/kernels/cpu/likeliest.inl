// The likeliest token of a row of scores.
#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

// Index of the largest of n floats, the lowest among equals; -1 where one is NaN.
static int64_t likeliest(const float* x, int64_t n) {
  const float lowest = -__builtin_inff();
  const int64_t full = n / kLanes * kLanes;
  Vec largest = splat(lowest);
  IVec nan = {};
  for (int64_t i = 0; i < full; i += kLanes) {
    const Vec v = load(x + i);
    nan |= v != v;
    largest = vmax(v, largest);
  }
  float most = lowest;
  bool has_nan = false;
  for (int lane = 0; lane < kLanes; ++lane) {
    most = largest[lane] > most ? largest[lane] : most;
    has_nan |= nan[lane] != 0;
  }
  for (int64_t i = full; i < n; ++i) {
    most = x[i] > most ? x[i] : most;
    has_nan |= x[i] != x[i];
  }
  if (has_nan) return -1;
  int64_t found = 0;
  while (found < n && x[found] != most) ++found;
  return found;
}

}  // namespace ellm::ELLM_ISA
