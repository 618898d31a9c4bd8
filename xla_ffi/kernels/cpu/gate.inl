// What comes between the two products of an MLP.
#pragma once

#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

template <class T>
static void silu_mul_typed(const T* x, T* out, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, x += 2 * n, out += n) {
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec gate = load_up_to(x + i, n - i);
      const Vec up = load_up_to(x + n + i, n - i);
      store_part(out + i, gate / (1.0f + exp(-gate)) * up, n - i);
    }
  }
}

}  // namespace ellm::ELLM_ISA
