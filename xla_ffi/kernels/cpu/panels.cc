#include "kernels/cpu/panels.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/columns.h"
#include "kernels/cpu/ranges.h"
#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {
// Multiplications, and elements to widen, below which handing out costs more than it saves.
constexpr int64_t kSerialWork = 32 * 1024;
constexpr int64_t kSerialWiden = 64 * 1024;
// Rows and words that are turned round together while a matrix is packed.
constexpr int64_t kTile = 16;
}  // namespace

void pack_panels(void* matrix, int64_t n, int64_t words) {
  auto* const all = static_cast<char*>(matrix);
  const auto bytes_of = [](int64_t count) { return static_cast<size_t>(count * kWordBytes); };
  std::vector<char> rows(bytes_of(std::min(kPanelOutputs, n) * words));
  for (int64_t first = 0; first < n; first += kPanelOutputs) {
    const int64_t width = std::min(kPanelOutputs, n - first);
    char* const panel = all + bytes_of(first * words);
    std::memcpy(rows.data(), panel, bytes_of(width * words));
    for (int64_t row = 0; row < width; row += kTile) {
      const int64_t height = std::min(kTile, width - row);
      for (int64_t word = 0; word < words; word += kTile) {
        const int64_t length = std::min(kTile, words - word);
        uint32_t tile[kTile][kTile];
        for (int64_t i = 0; i < height; ++i) {
          std::memcpy(tile[i], rows.data() + bytes_of((row + i) * words + word), bytes_of(length));
        }
        for (int64_t j = 0; j < length; ++j) {
          uint32_t line[kTile];
          for (int64_t i = 0; i < height; ++i) line[i] = tile[i][j];
          std::memcpy(panel + bytes_of((word + j) * width + row), line, bytes_of(height));
        }
      }
    }
  }
}

void alternate_halves(void* matrix, int64_t n, int64_t row_bytes) {
  constexpr int64_t kHalf = kPanelOutputs / 2;
  const int64_t halves = n / kHalf;
  std::vector<char> moving(static_cast<size_t>(kHalf * row_bytes));
  const auto half_at = [&](int64_t index) {
    return static_cast<char*>(matrix) + index * kHalf * row_bytes;
  };
  const auto new_index = [&](int64_t index) {
    return index < halves / 2 ? 2 * index : 2 * (index - halves / 2) + 1;
  };
  // Round and round: what is put somewhere takes the place of what has to move next.
  std::vector<bool> done(static_cast<size_t>(halves));
  for (int64_t first = 0; first < halves; ++first) {
    if (done[first]) continue;
    std::memcpy(moving.data(), half_at(first), moving.size());
    int64_t at = first;
    do {
      at = new_index(at);
      std::swap_ranges(moving.begin(), moving.end(), half_at(at));
      done[at] = true;
    } while (at != first);
  }
}

void linear_panels(const Kernels& kernels, const void* x, ElementType x_type, const uint16_t* w,
                   void* out, ElementType out_type, int64_t rows, int64_t n, int64_t k,
                   const ParallelFor& parallel, int64_t threads, const Finish& finish) {
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
  args.finish = finish;
  if (x_type == ElementType::kBFloat16 && !kernels.bf16_pairs) {
    args.x_stride = (k + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    float* wide = Scratch::floats(rows * args.x_stride);
    const auto widen = [&](int64_t row) {
      kernels.to_float(static_cast<const uint16_t*>(x) + row * k, x_type, 1, k, args.x_stride,
                       wide + row * args.x_stride);
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
