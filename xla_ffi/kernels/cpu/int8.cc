#include "kernels/cpu/int8.h"

#include <algorithm>

#include "kernels/cpu/columns.h"
#include "kernels/cpu/ranges.h"
#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {
// Columns a thread takes at a time: what the kernels take together.
constexpr int64_t kColumns = 48;
// Multiplications, and elements to quantise, below which handing out costs more than it saves.
constexpr int64_t kSerialWork = 64 * 1024;
constexpr int64_t kSerialQuantize = 16 * 1024;

// The scratch of `rows` rows: values, then scales, then sums, each of them aligned.
Int8Rows scratch_rows(int64_t rows, int64_t k) {
  Int8Rows x;
  x.stride = (k + kInt8Padding - 1) / kInt8Padding * kInt8Padding;
  const int64_t value_words = rows * x.stride / static_cast<int64_t>(sizeof(float));
  float* at = Scratch::floats(value_words + 2 * rows);
  x.values = reinterpret_cast<int8_t*>(at);
  x.scales = at + value_words;
  x.sums = reinterpret_cast<int32_t*>(x.scales + rows);
  return x;
}
}  // namespace

void int8_linear(const Int8Kernels& kernels, const void* x, ElementType x_type, const int8_t* w,
                 const float* w_scale, void* out, ElementType out_type, int64_t rows, int64_t n,
                 int64_t k, const ParallelFor& parallel, int64_t threads) {
  if (rows == 0 || n == 0) return;
  const Int8Rows all = scratch_rows(rows, k);
  const auto quantize = [&](int64_t row) {
    const Int8Rows to = {all.values + row * all.stride, all.stride, all.scales + row,
                         all.sums + row};
    kernels.quantize(static_cast<const char*>(x) + row * k * element_bytes(x_type), x_type, 1, k,
                     to);
  };
  if (rows * k <= kSerialQuantize) {
    run_serially(rows, quantize);
  } else {
    parallel(rows, quantize);
  }
  const Int8Args args = {all, w, w_scale, out, out_type, rows, n, k};
  if (rows * n * k <= kSerialWork) {
    kernels.linear(args, {0, n, n, false});
    return;
  }
  parallel_ranges(parallel, threads, (n + kColumns - 1) / kColumns, [&](const RangeUnit& unit) {
    kernels.linear(args, unit_columns(unit, kColumns, n));
  });
}

}  // namespace ellm
