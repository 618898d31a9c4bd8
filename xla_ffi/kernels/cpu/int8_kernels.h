// The kernels of int8 linear layers as plain functions on pointers and shapes: a table per
// instruction set, chosen apart from that of kernels.h, for processors have them in other
// combinations.
//
// A row of numbers is held as int8 values in [-127, 127] and one float32 scale. Products of two
// such rows are summed in int32, which is exact, and scaled by the same float32 operations
// everywhere: every table gives the same bits, whatever else is in the batch.
#pragma once

#include "kernels/cpu/kernels.h"

namespace ellm {

// Most elements of a row: no sum of products, offsets included, leaves the range of int32.
constexpr int64_t kInt8MaxK = 65536;

// Rows of activations are padded with zeros to a multiple of this.
constexpr int64_t kInt8Padding = 64;

// x[m, i] is about values[m, i] * scales[m].
struct Int8Rows {
  int8_t* values;  // [rows, stride], zero from k on
  int64_t stride;  // elements, at least k
  float* scales;   // [rows]
  int32_t* sums;   // [rows], of the values; null where nobody asks
};

// out[m, n] = float(sum_i x[m, i] * w[n, i]) * x_scale[m] * w_scale[n], rounded to the type of out.
struct Int8Args {
  Int8Rows x;            // stride a multiple of kInt8Padding; with sums
  const int8_t* w;       // [n, k], dense, in [-127, 127]
  const float* w_scale;  // [n]
  void* out;             // [rows, n] of out_type, dense
  ElementType out_type;
  int64_t rows;
  int64_t n;
  int64_t k;
  Finish finish;
};

struct Int8Kernels {
  const char* isa;
  // Rows [rows, k] of `type`, dense: scale = max |x| / 127, value = x / scale to the nearest, ties
  // to even. A row that is below 1e-30 all over is zero, and so is its scale; one that holds a NaN
  // or an infinity gets the scale NaN and values of zero.
  void (*quantize)(const void* x, ElementType type, int64_t rows, int64_t k, const Int8Rows& to);
  void (*linear)(const Int8Args& args, const Columns& columns);
  // The same with w in panels (panels.h) and columns that begin at panels, k being a multiple of 4;
  // null where that is no faster.
  void (*linear_panels)(const Int8Args& args, const Columns& columns);
};

// The best table this CPU can run.
const Int8Kernels& int8_kernels();

// The table named `isa` ("avx512_vnni", "avx512", "avx2", "generic"), or null where the CPU or the
// build lacks it.
const Int8Kernels* int8_kernels_for(const char* isa);

}  // namespace ellm
