// y = x w^T in int8, over all threads.
#pragma once

#include "kernels/cpu/int8_kernels.h"
#include "kernels/cpu/parallel.h"

namespace ellm {

// Int8Args::out from rows of x in float32 or bfloat16, which are quantised first; k up to
// kInt8MaxK. Bytes of x, w, w_scale, out: rows*k of x_type, n*k, 4*n, rows*n of out_type. `threads`
// is how many `parallel` has; any number is correct.
void int8_linear(const Int8Kernels& kernels, const void* x, ElementType x_type, const int8_t* w,
                 const float* w_scale, void* out, ElementType out_type, int64_t rows, int64_t n,
                 int64_t k, const ParallelFor& parallel, int64_t threads);

// The same with w in panels, and `finish` after the products; only where the kernels have
// linear_panels.
void int8_linear_panels(const Int8Kernels& kernels, const void* x, ElementType x_type,
                        const int8_t* w, const float* w_scale, void* out, ElementType out_type,
                        int64_t rows, int64_t n, int64_t k, const ParallelFor& parallel,
                        int64_t threads, const Finish& finish = {});

}  // namespace ellm
