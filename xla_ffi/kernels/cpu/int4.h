// y = x w^T with weights in int4, over all threads.
#pragma once

#include "kernels/cpu/int4_kernels.h"
#include "kernels/cpu/parallel.h"

namespace ellm {

// Int4Args::out from rows of x [rows, k] in float32 or bfloat16, dense, which are quantised first.
void int4_linear(const Int4Kernels& kernels, const void* x, ElementType x_type,
                 const Int4Weights& w, void* out, ElementType out_type, int64_t rows,
                 const ParallelFor& parallel);

}  // namespace ellm
