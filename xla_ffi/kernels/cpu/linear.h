// y = x w^T over all threads.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"

namespace ellm {

// out[m, n] = sum_k x[m, k] * w[n, k] for m < rows, float32 accumulation, dense row-major operands.
// Bytes of x, w, out: rows*k of x_type, n*k of w_type, rows*n of out_type. `threads` is how many
// `parallel` has; any number is correct.
void linear(const Kernels& kernels, const void* x, ElementType x_type, const void* w,
            ElementType w_type, void* out, ElementType out_type, int64_t rows, int64_t n, int64_t k,
            const ParallelFor& parallel, int64_t threads);

}  // namespace ellm
