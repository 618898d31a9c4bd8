// The kernels of int4 linear layers as plain functions on pointers and shapes: a table per
// instruction set, chosen as that of int8_kernels.h is.
//
// A weight is a step of its group, `group` inputs of one output: scale * (step - zero), with steps
// from 0 to 15. Activations are int8 with a scale for each such group (Int8Kernels::quantize), so
// that one large activation costs precision in its own group alone. Within a group the products
// are summed in int32, which is exact; the groups are added in float32, one after the other.
//
// Weights lie in panels of kInt4Columns outputs, so that a sum stays in its lane and no lanes are
// ever added up. A panel has, group by group, 64 bytes for every 8 inputs i: byte 4 c + b holds, of
// output c, the step of input i + b in its low half and of i + 4 + b in its high half. Scales and
// zeros lie in the same order. Outputs and inputs that fill up a panel or a group are zero.
#pragma once

#include "kernels/cpu/int8_kernels.h"

namespace ellm {

constexpr int64_t kInt4Columns = 16;

// The zero point where there are none of their own.
constexpr int32_t kInt4Zero = 8;

struct Int4Weights {
  const uint8_t* values;   // [panels, groups, 8 * group]
  const uint16_t* scales;  // [panels, groups, kInt4Columns], float16
  const uint8_t* zeros;    // like scales, 0 to 15; or null: kInt4Zero
  int64_t group;           // 32 or 128
  int64_t n;
  int64_t k;

  int64_t groups() const { return (k + group - 1) / group; }
  int64_t panels() const { return (n + kInt4Columns - 1) / kInt4Columns; }
};

inline bool int4_group_fits(int64_t group) { return group == 32 || group == 128; }

// out[m, n] = sum over groups of (sum_i x[m, i] * (w[n, i] - zero[n])) * (scale[n] * x_scale[m]),
// rounded to the type of out.
struct Int4Args {
  // values [rows, groups * group]; scales and sums [rows, groups].
  Int8Rows x;
  Int4Weights w;
  void* out;  // [rows, n] of out_type, dense
  ElementType out_type;
  int64_t rows;
};

struct Int4Kernels {
  const char* isa;
  // One panel: rows [rows, k] of `type`, dense, to steps and float16 scales; what is past `rows`,
  // up to kInt4Columns, and past k is zero. The scale of a group is, of several near its extreme
  // over -8, the one with the least squared error. Below 1e-6 all over it is zero. A group that
  // holds a NaN, an infinity or a number from 4e5 on gets the scale NaN.
  void (*quantize)(const void* x, ElementType type, int64_t rows, int64_t k, int64_t group,
                   uint8_t* values, uint16_t* scales);
  // Panels [begin, end) of `out`.
  void (*linear)(const Int4Args& args, int64_t begin, int64_t end);
};

// The best table this CPU can run.
const Int4Kernels& int4_kernels();

// The table named `isa` ("avx512_vnni", "avx512", "avx2", "generic"), or null where the CPU or the
// build lacks it.
const Int4Kernels* int4_kernels_for(const char* isa);

// One panel of steps [rows, k], dense, each 0 to 15, to `values` as the kernels read them. `fill`
// is the step of inputs and outputs beyond them.
void int4_pack(const uint8_t* steps, int64_t rows, int64_t k, int64_t group, uint8_t fill,
               uint8_t* values);

}  // namespace ellm
