// Conversion of rows to float32, shared by the kernels.
#pragma once

#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

template <class T>
constexpr ElementType kTypeOf = sizeof(T) == 4 ? ElementType::kFloat32 : ElementType::kBFloat16;

template <class T>
static void to_float_typed(const T* x, int64_t rows, int64_t k, int64_t x_stride, float* out) {
  const int64_t full = k / kLanes * kLanes;
  for (int64_t m = 0; m < rows; ++m) {
    const T* from = x + m * k;
    float* to = out + m * x_stride;
    for (int64_t i = 0; i < full; i += kLanes) store(to + i, load(from + i));
    int64_t i = full;
    if (full < k) {
      store(to + full, load_part(from + full, k - full));
      i += kLanes;
    }
    for (; i < x_stride; i += kLanes) store(to + i, Vec{});
  }
}

static void to_float(const void* x, ElementType type, int64_t rows, int64_t k, int64_t x_stride,
                     float* out) {
  if (type == ElementType::kFloat32) {
    to_float_typed(static_cast<const float*>(x), rows, k, x_stride, out);
  } else {
    to_float_typed(static_cast<const uint16_t*>(x), rows, k, x_stride, out);
  }
}

}  // namespace ellm::ELLM_ISA
