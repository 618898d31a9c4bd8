#include "kernels/cpu/int8.h"

#include <algorithm>

#include "kernels/cpu/columns.h"
#include "kernels/cpu/panels.h"
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

// `columns` are what a thread takes at a time.
void quantize_and_multiply(const Int8Kernels& kernels, decltype(Int8Kernels::linear) multiply,
                           int64_t columns, const void* x, ElementType x_type, Int8Args args,
                           const ParallelFor& parallel, int64_t threads) {
  const int64_t rows = args.rows, n = args.n, k = args.k;
  if (rows == 0 || n == 0) return;
  args.x = scratch_rows(rows, k);
  const auto quantize = [&](int64_t row) {
    const Int8Rows to = {args.x.values + row * args.x.stride, args.x.stride, args.x.scales + row,
                         args.x.sums + row};
    kernels.quantize(static_cast<const char*>(x) + row * k * element_bytes(x_type), x_type, 1, k,
                     to);
  };
  if (rows * k <= kSerialQuantize) {
    run_serially(rows, quantize);
  } else {
    parallel(rows, quantize);
  }
  if (rows * n * k <= kSerialWork) {
    multiply(args, {0, n, n, false});
    return;
  }
  parallel_ranges(parallel, threads, (n + columns - 1) / columns,
                  [&](const RangeUnit& unit) { multiply(args, unit_columns(unit, columns, n)); });
}
}  // namespace

void int8_linear(const Int8Kernels& kernels, const void* x, ElementType x_type, const int8_t* w,
                 const float* w_scale, void* out, ElementType out_type, int64_t rows, int64_t n,
                 int64_t k, const ParallelFor& parallel, int64_t threads) {
  quantize_and_multiply(kernels, kernels.linear, kColumns, x, x_type,
                        {{}, w, w_scale, out, out_type, rows, n, k, {}}, parallel, threads);
}

void int8_linear_panels(const Int8Kernels& kernels, const void* x, ElementType x_type,
                        const int8_t* w, const float* w_scale, void* out, ElementType out_type,
                        int64_t rows, int64_t n, int64_t k, const ParallelFor& parallel,
                        int64_t threads, const Finish& finish) {
  quantize_and_multiply(kernels, kernels.linear_panels, kPanelOutputs, x, x_type,
                        {{}, w, w_scale, out, out_type, rows, n, k, finish}, parallel, threads);
}

}  // namespace ellm
