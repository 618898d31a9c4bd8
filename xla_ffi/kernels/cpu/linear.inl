// Linear layers: rows of x against rows of w, both running along k. No packing: w is read in
// the [n, k] order in which checkpoints store it, so there is one copy of it in memory.
#include "kernels/cpu/fetch.inl"
#include "kernels/cpu/panel.inl"

namespace ellm::ELLM_ISA {

// Rows of x that share each load of w, at most: with two columns enough sums to hide how long an
// addition takes. More rows would meet in the same sets of the level-1 cache.
constexpr int kMaxRows = kLanes == 16 ? 8 : 6;

// Columns taken together. The prefetchers follow one row of w best, so one or two rows of x, which
// only wait for w, take it row by row; more would wait for their additions.
constexpr int columns_for(int64_t mr) { return mr <= 2 ? 1 : 2; }

// Bytes of x that stay in the level-1 cache while w passes. A longer panel is taken in pieces
// along k.
constexpr int64_t kInputBytes = 32 * 1024;

// Bytes of w that lie in the level-2 cache while all panels of x pass them. Each of many panels is
// loaded once for a block, so there blocks are larger. The next block is asked for meanwhile.
constexpr int64_t kWeightBlockBytes = 32 * 1024;
constexpr int64_t kManyPanelsBlockBytes = 512 * 1024;

// Elements of x along k that are taken at a time in panels of `mr` rows.
template <class X>
constexpr int64_t input_depth(int64_t mr, int64_t width) {
  return kInputBytes / mr / static_cast<int64_t>(sizeof(X)) / width * width;
}

// How x and w are read along k: kWidth elements at a time, as float32 or as pairs of bfloat16.
template <class X, class W>
struct Along {
  using Arithmetic = std::conditional_t<sizeof(X) == 2, Pairs, Floats>;
  static constexpr int64_t kWidth = kLanes * Arithmetic::kPerWord;
  template <class T>
  static inline Vec whole(const T* p) {
    if constexpr (Arithmetic::kPerWord == 1) {
      return load(p);
    } else {
      return load(reinterpret_cast<const float*>(p));
    }
  }
  template <class T>
  static inline Vec part(const T* p, int64_t left) {
    T padded[kWidth] = {};
    std::memcpy(padded, p, left * sizeof(T));
    return whole(padded);
  }
};

// sums[m * kLanes] += x[m] . w[j] over the elements [begin, end), `end` being k or a multiple of
// the width, for MR rows and NR columns; column j's sums are a vector further on for each j.
template <int MR, int NR, class X, class W>
static inline void linear_block(const X* x, int64_t x_stride, const W* w, int64_t k, int64_t begin,
                                int64_t end, Vec* sums, Lines ahead) {
  using Read = Along<X, W>;
  constexpr int64_t kWidth = Read::kWidth;
  Vec acc[MR * NR];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) acc[m * NR + j] = begin == 0 ? Vec{} : sums[m * kLanes + j];
  }
  const int64_t full = end / kWidth * kWidth;
#pragma GCC unroll 2
  for (int64_t i = begin; i < full; i += kWidth) {
    ahead.ask<NR>();
    Vec wv[NR];
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) wv[j] = Read::whole(w + j * k + i);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec xv = Read::whole(x + m * x_stride + i);
#pragma GCC unroll 2
      for (int j = 0; j < NR; ++j) {
        acc[m * NR + j] = Read::Arithmetic::multiply_add(acc[m * NR + j], xv, wv[j]);
      }
    }
  }
  if (full < end) {
    Vec wv[NR];
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) wv[j] = Read::part(w + j * k + full, end - full);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const Vec xv = Read::part(x + m * x_stride + full, end - full);
#pragma GCC unroll 2
      for (int j = 0; j < NR; ++j) {
        acc[m * NR + j] = Read::Arithmetic::multiply_add(acc[m * NR + j], xv, wv[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) sums[m * kLanes + j] = acc[m * NR + j];
  }
}

// Rows [m, m + MR). The vectors of kLanes columns are added up together.
template <int MR, class X, class W>
static inline void linear_rows(const LinearArgs& a, int64_t m, int64_t n_begin, int64_t n_end,
                               LinesAhead* ahead) {
  constexpr int64_t kWidth = Along<X, W>::kWidth;
  constexpr int64_t kDepth = input_depth<X>(MR, kWidth);
  constexpr int NR = columns_for(MR);
  const X* x = static_cast<const X*>(a.x) + m * a.x_stride;
  Vec sums[MR * kLanes];
  for (int64_t n = n_begin; n < n_end; n += kLanes) {
    const W* w = static_cast<const W*>(a.w) + n * a.k;
    const int64_t columns = min_of(kLanes, n_end - n);
    if (columns < kLanes) std::memset(sums, 0, sizeof sums);
    for (int64_t begin = 0; begin < a.k; begin += kDepth) {
      const int64_t end = min_of(begin + kDepth, a.k);
      int64_t j = 0;
      for (; j + NR <= columns; j += NR) {
        linear_block<MR, NR>(x, a.x_stride, w + j * a.k, a.k, begin, end, sums + j, ahead->take());
      }
      for (; j < columns; ++j) {
        linear_block<MR, 1>(x, a.x_stride, w + j * a.k, a.k, begin, end, sums + j, {});
      }
    }
    for (int i = 0; i < MR; ++i) {
      const Vec y = sum_each(sums + i * kLanes);
      const int64_t at = (m + i) * a.n + n;
      if (a.out_type == ElementType::kFloat32) {
        store_part(static_cast<float*>(a.out) + at, y, columns);
      } else {
        store_part(static_cast<uint16_t*>(a.out) + at, y, columns);
      }
    }
  }
}

// linear_rows for `mr` rows, 1 to MR.
template <int MR, class X, class W>
static inline void linear_panel(const LinearArgs& a, int64_t mr, int64_t m, int64_t n_begin,
                                int64_t n_end, LinesAhead* ahead) {
  if (mr == MR) return linear_rows<MR, X, W>(a, m, n_begin, n_end, ahead);
  if constexpr (MR > 1) linear_panel<MR - 1, X, W>(a, mr, m, n_begin, n_end, ahead);
}

template <class X, class W>
static void linear_typed(const LinearArgs& a, const Columns& c) {
  const int64_t row_bytes = a.k * static_cast<int64_t>(sizeof(W));
  const int64_t block_bytes = a.rows > kMaxRows ? kManyPanelsBlockBytes : kWeightBlockBytes;
  const int64_t step = max_of(kLanes, block_bytes / row_bytes / kLanes * kLanes);
  const int64_t all_panels = (a.rows + kMaxRows - 1) / kMaxRows;
  const int64_t depth = input_depth<X>((a.rows + all_panels - 1) / all_panels, Along<X, W>::kWidth);
  const int64_t pieces = (a.k + depth - 1) / depth;
  const W* w = static_cast<const W*>(a.w);
  for (int64_t n = c.begin; n < c.end; n += step) {
    const int64_t stop = min_of(n + step, c.end);
    const int NR = columns_for(a.rows);
    LinesAhead ahead;
    if (NR > 1) {
      if (n == c.begin && !c.asked) fetch(w + n * a.k, (stop - n) * row_bytes);
      const int64_t next = min_of(stop + step, stop < c.end ? c.end : c.ahead);
      const int64_t calls = all_panels * pieces * max_of(1, (stop - n) / NR);
      ahead = LinesAhead(w + stop * a.k, (next - stop) * row_bytes, calls);
    }
    // Panels of nearly the same height: 9 rows are 5 + 4, for 8 + 1 would read w once more alone.
    int64_t panels = all_panels;
    for (int64_t m = 0; m < a.rows; --panels) {
      const int64_t mr = (a.rows - m + panels - 1) / panels;
      linear_panel<kMaxRows, X, W>(a, mr, m, n, stop, &ahead);
      m += mr;
    }
  }
}

static void linear(const LinearArgs& a, const Columns& columns) {
  if (a.w_type == ElementType::kFloat32) return linear_typed<float, float>(a, columns);
  if constexpr (kHasPairs) {
    if (a.x_type == ElementType::kBFloat16) return linear_typed<uint16_t, uint16_t>(a, columns);
  }
  linear_typed<float, uint16_t>(a, columns);
}

}  // namespace ellm::ELLM_ISA
