#include "kernels/cpu/int4.h"

#include <algorithm>

#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {
// Bytes of weights a thread takes at a time: enough to hide handing them out and what is prefetched
// past the end, few enough to share the work of a layer evenly.
constexpr int64_t kUnitBytes = 128 * 1024;
// Units of a layer, at least, where it has as many pairs of panels.
constexpr int64_t kFewestUnits = 8;
// What is taken together by the kernels, at most.
constexpr int64_t kPanelsTogether = 2;
// Multiplications, and elements to quantise, below which handing out costs more than it saves.
constexpr int64_t kSerialWork = 64 * 1024;
constexpr int64_t kSerialQuantize = 16 * 1024;

// The scratch of `rows` rows: values, then scales, then sums, each of them aligned.
Int8Rows scratch_rows(int64_t rows, int64_t groups, int64_t group) {
  Int8Rows x;
  x.stride = groups * group;
  const int64_t value_words = rows * x.stride / static_cast<int64_t>(sizeof(float));
  const int64_t scale_words = (rows * groups + 15) / 16 * 16;
  float* at = Scratch::floats(value_words + 2 * scale_words);
  x.values = reinterpret_cast<int8_t*>(at);
  x.scales = at + value_words;
  x.sums = reinterpret_cast<int32_t*>(x.scales + scale_words);
  return x;
}

// One row, a scale per group. Inputs that fill up the last group are zero.
void quantize_groups(const char* x, ElementType type, int64_t k, int64_t group,
                     const Int8Rows& to) {
  const auto quantize = int8_kernels().quantize;
  const int64_t whole = k / group;
  quantize(x, type, whole, group, {to.values, group, to.scales, to.sums});
  if (whole * group == k) return;
  quantize(x + whole * group * element_bytes(type), type, 1, k - whole * group,
           {to.values + whole * group, group, to.scales + whole, to.sums + whole});
}
}  // namespace

void int4_linear(const Int4Kernels& kernels, const void* x, ElementType x_type,
                 const Int4Weights& w, void* out, ElementType out_type, int64_t rows,
                 const ParallelFor& parallel) {
  if (rows == 0 || w.n == 0) return;
  const int64_t groups = w.groups();
  const Int8Rows all = scratch_rows(rows, groups, w.group);
  const auto quantize = [&](int64_t row) {
    const Int8Rows to = {all.values + row * all.stride, all.stride, all.scales + row * groups,
                         all.sums + row * groups};
    quantize_groups(static_cast<const char*>(x) + row * w.k * element_bytes(x_type), x_type, w.k,
                    w.group, to);
  };
  if (rows * w.k <= kSerialQuantize) {
    run_serially(rows, quantize);
  } else {
    parallel(rows, quantize);
  }
  const Int4Args args = {all, w, out, out_type, rows};
  const int64_t panels = w.panels();
  if (rows * w.n * w.k <= kSerialWork) {
    kernels.linear(args, 0, panels);
    return;
  }
  const int64_t panel_bytes = all.stride * kInt4Columns / 2;
  const int64_t most = std::min(kUnitBytes / panel_bytes, panels / kFewestUnits);
  const int64_t step = std::max(kPanelsTogether, most / kPanelsTogether * kPanelsTogether);
  parallel((panels + step - 1) / step, [&](int64_t unit) {
    kernels.linear(args, unit * step, std::min(panels, (unit + 1) * step));
  });
}

}  // namespace ellm
