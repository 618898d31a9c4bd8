// Linear layers over weights in panels.
#pragma once

#include <cstdint>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace ellm {

// A row of weights consists of words of four bytes: two bfloat16, or four int8. A matrix of n rows
// in panels: kPanelOutputs rows, fewer in the last panel, lie together; of each panel word after
// word, for each word row after row. So the weights that several rows of x share are one stretch of
// memory, and a vector of sums holds as many outputs. It takes as many bytes as row by row, and a
// panel begins where its first row would.
constexpr int64_t kPanelOutputs = 64;
constexpr int64_t kWordBytes = 4;

// Puts a matrix of n rows of `words` words each into panels, in its place.
void pack_panels(void* matrix, int64_t n, int64_t words);

// Of a matrix of n rows, n a multiple of kPanelOutputs, the first half of which are gates and the
// other half ups: puts half a panel of gates and half a panel of ups by turns, in its place.
void alternate_halves(void* matrix, int64_t n, int64_t row_bytes);

// out[m, n] = sum_k x[m, k] * w[n, k] for m < rows, accumulated in float32 along k. As linear(),
// but w is bfloat16 in panels, k even, and `finish` comes after the products.
void linear_panels(const Kernels& kernels, const void* x, ElementType x_type, const uint16_t* w,
                   void* out, ElementType out_type, int64_t rows, int64_t n, int64_t k,
                   const ParallelFor& parallel, int64_t threads, const Finish& finish = {});

}  // namespace ellm
