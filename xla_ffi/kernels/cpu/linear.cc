#include "kernels/cpu/linear.h"

#include <algorithm>

#include "kernels/cpu/columns.h"
#include "kernels/cpu/ranges.h"
#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {
// Columns a thread takes at a time: enough to be worth handing out, few enough to balance, and a
// multiple of what the kernels add up together.
constexpr int64_t kColumns = 48;
// The same where rows are many and there are at least some of these units for each thread: rows
// pass through the level-1 cache once for each unit.
constexpr int64_t kManyRows = 8;
constexpr int64_t kManyRowsColumns = 96;
constexpr int64_t kUnitsPerThread = 4;
// Multiplications, and elements to widen, below which handing out costs more than it saves.
constexpr int64_t kSerialWork = 32 * 1024;
constexpr int64_t kSerialWiden = 64 * 1024;
}  // namespace

void linear(const Kernels& kernels, const void* x, ElementType x_type, const void* w,
            ElementType w_type, void* out, ElementType out_type, int64_t rows, int64_t n, int64_t k,
            const ParallelFor& parallel, int64_t threads) {
  if (rows == 0 || n == 0) return;
  LinearArgs args;
  args.w = w;
  args.w_type = w_type;
  args.out = out;
  args.out_type = out_type;
  args.rows = rows;
  args.n = n;
  args.k = k;
  args.x_type = ElementType::kFloat32;
  if (x_type == ElementType::kFloat32 && k % kernels.lanes == 0) {
    args.x = x;
    args.x_stride = k;
  } else if (kernels.bf16_pairs && x_type == ElementType::kBFloat16 && w_type == x_type) {
    args.x = x;
    args.x_type = x_type;
    args.x_stride = k;
  } else {
    args.x_stride = (k + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    float* wide = Scratch::floats(rows * args.x_stride);
    const auto widen = [&](int64_t row) {
      kernels.to_float(static_cast<const char*>(x) + row * k * element_bytes(x_type), x_type, 1, k,
                       args.x_stride, wide + row * args.x_stride);
    };
    if (rows * k <= kSerialWiden) {
      run_serially(rows, widen);
    } else {
      parallel(rows, widen);
    }
    args.x = wide;
  }
  if (rows * n * k <= kSerialWork) {
    kernels.linear(args, {0, n, n, false});
    return;
  }
  const bool wide = rows > kManyRows && n >= kUnitsPerThread * threads * kManyRowsColumns;
  const int64_t columns = wide ? kManyRowsColumns : kColumns;
  parallel_ranges(parallel, threads, (n + columns - 1) / columns, [&](const RangeUnit& unit) {
    kernels.linear(args, unit_columns(unit, columns, n));
  });
}

}  // namespace ellm
