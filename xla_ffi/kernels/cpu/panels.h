// Linear layers over bfloat16 weights in panels.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace ellm {

// A matrix [n, k] in panels: kPanelOutputs outputs, fewer in the last panel, lie together; of each
// panel two inputs after two, for each pair of inputs output after output. So the weights that
// several rows of x share are one stretch of memory, and a vector of sums holds as many outputs.
// As many bytes as row by row; a panel begins at the multiple of kPanelOutputs * k that its first
// row would begin at. k is even.
constexpr int64_t kPanelOutputs = 64;

// Puts `count` rows of a matrix [n, k] that follow each other, from `first` on, into its panels.
void pack_panels(const uint16_t* rows, int64_t first, int64_t count, int64_t n, int64_t k,
                 uint16_t* panels);

// out[m, n] = sum_k x[m, k] * w[n, k] for m < rows, accumulated in float32 along k. As linear(),
// but w is in panels, and x of float32 where it is not bfloat16.
void linear_panels(const Kernels& kernels, const void* x, ElementType x_type, const uint16_t* w,
                   void* out, ElementType out_type, int64_t rows, int64_t n, int64_t k,
                   const ParallelFor& parallel, int64_t threads);

}  // namespace ellm
