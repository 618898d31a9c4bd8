#include "kernels/cpu/panels.h"

#include <algorithm>
#include <cstring>

#include "kernels/cpu/columns.h"
#include "kernels/cpu/ranges.h"
#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {
// Multiplications, and elements to widen, below which handing out costs more than it saves.
constexpr int64_t kSerialWork = 32 * 1024;
constexpr int64_t kSerialWiden = 64 * 1024;
// Rows and pairs of inputs that are turned round together while a matrix is packed.
constexpr int64_t kTile = 16;
}  // namespace

void pack_panels(const uint16_t* rows, int64_t first, int64_t count, int64_t n, int64_t k,
                 uint16_t* panels) {
  for (int64_t begin = first; begin < first + count;) {
    const int64_t panel = begin / kPanelOutputs * kPanelOutputs;
    const int64_t width = std::min(kPanelOutputs, n - panel);
    const int64_t end = std::min({begin + kTile, first + count, panel + width});
    uint16_t* to = panels + panel * k;
    for (int64_t pairs = 0; pairs < k / 2; pairs += kTile) {
      const int64_t pairs_end = std::min(pairs + kTile, k / 2);
      uint32_t tile[kTile][kTile];
      for (int64_t row = begin; row < end; ++row) {
        std::memcpy(tile[row - begin], rows + (row - first) * k + 2 * pairs,
                    static_cast<size_t>(pairs_end - pairs) * sizeof(uint32_t));
      }
      for (int64_t p = pairs; p < pairs_end; ++p) {
        uint32_t line[kTile];
        for (int64_t row = begin; row < end; ++row)
          line[row - begin] = tile[row - begin][p - pairs];
        std::memcpy(to + 2 * (p * width + begin - panel), line,
                    static_cast<size_t>(end - begin) * sizeof(uint32_t));
      }
    }
    begin = end;
  }
}

void linear_panels(const Kernels& kernels, const void* x, ElementType x_type, const uint16_t* w,
                   void* out, ElementType out_type, int64_t rows, int64_t n, int64_t k,
                   const ParallelFor& parallel, int64_t threads) {
  if (rows == 0 || n == 0) return;
  LinearArgs args;
  args.x = x;
  args.x_type = x_type;
  args.x_stride = k;
  args.w = w;
  args.w_type = ElementType::kBFloat16;
  args.out = out;
  args.out_type = out_type;
  args.rows = rows;
  args.n = n;
  args.k = k;
  if (x_type == ElementType::kBFloat16 && !kernels.bf16_pairs) {
    float* wide = Scratch::floats(rows * k);
    const auto widen = [&](int64_t row) {
      kernels.to_float(static_cast<const uint16_t*>(x) + row * k, x_type, 1, k, k, wide + row * k);
    };
    if (rows * k <= kSerialWiden) {
      run_serially(rows, widen);
    } else {
      parallel(rows, widen);
    }
    args.x = wide;
    args.x_type = ElementType::kFloat32;
  }
  if (rows * n * k <= kSerialWork) {
    kernels.linear_panels(args, {0, n, n, false});
    return;
  }
  const int64_t panels = (n + kPanelOutputs - 1) / kPanelOutputs;
  parallel_ranges(parallel, threads, panels, [&](const RangeUnit& unit) {
    kernels.linear_panels(args, unit_columns(unit, kPanelOutputs, n));
  });
}

}  // namespace ellm
