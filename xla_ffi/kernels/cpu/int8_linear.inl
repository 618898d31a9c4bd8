// Linear layers of int8: rows of x against rows of w, both running along k, as in linear.inl.
#include "kernels/cpu/fetch.inl"
#include "kernels/cpu/int8_dot.inl"

namespace ellm::ELLM_ISA {

// As in linear.inl, and for the same reasons: the most rows of x that share each load of w, how
// many columns are taken together, and the bytes of x and of w that stay in caches.
constexpr int kInt8Rows = kLanes == 16 ? 8 : 4;
constexpr int int8_columns(int64_t mr) { return mr <= 2 ? 1 : 2; }
constexpr int64_t kInt8InputBytes = 32 * 1024;
constexpr int64_t kInt8BlockBytes = 32 * 1024;
constexpr int64_t int8_depth(int64_t mr) {
  return kInt8InputBytes / mr / kInt8Padding * kInt8Padding;
}

// sums[m * kLanes] += (w[j] + kOffset) . x[m] over the elements [begin, end), `end` being k or a
// multiple of kInt8Padding, for MR rows and NR columns; column j's sums are a vector further on for
// each j.
template <int MR, int NR>
static inline void int8_block(const int8_t* x, int64_t x_stride, const int8_t* w, int64_t k,
                              int64_t begin, int64_t end, IVec* sums, Lines ahead) {
  IVec acc[MR * NR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) acc[m * NR + j] = begin == 0 ? IVec{} : sums[m * kLanes + j];
  }
  const int64_t full = end / Bytes::kWidth * Bytes::kWidth;
#pragma GCC unroll 2
  for (int64_t i = begin; i < full; i += Bytes::kWidth) {
    ahead.ask<NR>();
    typename Bytes::Operand wv[NR];
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) wv[j] = Bytes::weights(w + j * k + i);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto xv = Bytes::inputs(x + m * x_stride + i);
#pragma GCC unroll 2
      for (int j = 0; j < NR; ++j) {
        acc[m * NR + j] = Bytes::multiply_add(acc[m * NR + j], wv[j], xv);
      }
    }
  }
  if (full < end) {  // x is padded, w is not
    typename Bytes::Operand wv[NR];
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) {
      int8_t padded[Bytes::kWidth] = {};
      std::memcpy(padded, w + j * k + full, end - full);
      wv[j] = Bytes::weights(padded);
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const auto xv = Bytes::inputs(x + m * x_stride + full);
#pragma GCC unroll 2
      for (int j = 0; j < NR; ++j) {
        acc[m * NR + j] = Bytes::multiply_add(acc[m * NR + j], wv[j], xv);
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int j = 0; j < NR; ++j) sums[m * kLanes + j] = acc[m * NR + j];
  }
}

// float(sums - correction) * x_scale * w_scale, for `count` columns of a row.
static inline Vec scaled(IVec sums, int32_t correction, float x_scale, const float* w_scale,
                         int64_t count) {
  const Vec v = __builtin_convertvector(sums - correction, Vec) * splat(x_scale);
  return v * load_up_to(w_scale, count);
}

// Rows [m, m + MR). The vectors of kLanes columns are added up together.
template <int MR>
static inline void int8_rows(const Int8Args& a, int64_t m, int64_t n_begin, int64_t n_end,
                             LinesAhead* ahead) {
  constexpr int NR = int8_columns(MR);
  constexpr int64_t kDepth = int8_depth(MR);
  const int8_t* x = a.x.values + m * a.x.stride;
  IVec sums[MR * kLanes];
  for (int64_t n = n_begin; n < n_end; n += kLanes) {
    const int8_t* w = a.w + n * a.k;
    const int64_t columns = min_of(kLanes, n_end - n);
    if (columns < kLanes) std::memset(sums, 0, sizeof sums);
    for (int64_t begin = 0; begin < a.k; begin += kDepth) {
      const int64_t end = min_of(begin + kDepth, a.k);
      int64_t j = 0;
      for (; j + NR <= columns; j += NR) {
        int8_block<MR, NR>(x, a.x.stride, w + j * a.k, a.k, begin, end, sums + j, ahead->take());
      }
      for (; j < columns; ++j) {
        int8_block<MR, 1>(x, a.x.stride, w + j * a.k, a.k, begin, end, sums + j, {});
      }
    }
    for (int i = 0; i < MR; ++i) {
      const IVec total = sum_each(sums + i * kLanes);
      const int32_t correction = Bytes::kOffset * a.x.sums[m + i];
      const float scale = a.x.scales[m + i];
      const int64_t at = (m + i) * a.n + n;
      const Vec v = scaled(total, correction, scale, a.w_scale + n, columns);
      if (a.out_type == ElementType::kFloat32) {
        store_part(static_cast<float*>(a.out) + at, v, columns);
      } else {
        store_part(static_cast<uint16_t*>(a.out) + at, v, columns);
      }
    }
  }
}

// int8_rows for `mr` rows, 1 to MR.
template <int MR>
static inline void int8_panel(const Int8Args& a, int64_t mr, int64_t m, int64_t n_begin,
                              int64_t n_end, LinesAhead* ahead) {
  if (mr == MR) return int8_rows<MR>(a, m, n_begin, n_end, ahead);
  if constexpr (MR > 1) int8_panel<MR - 1>(a, mr, m, n_begin, n_end, ahead);
}

static void int8_linear(const Int8Args& a, const Columns& c) {
  const int64_t step = max_of(kLanes, kInt8BlockBytes / a.k / kLanes * kLanes);
  const int64_t all_panels = (a.rows + kInt8Rows - 1) / kInt8Rows;
  const int64_t depth = int8_depth((a.rows + all_panels - 1) / all_panels);
  const int64_t pieces = (a.k + depth - 1) / depth;
  for (int64_t n = c.begin; n < c.end; n += step) {
    const int64_t stop = min_of(n + step, c.end);
    const int NR = int8_columns(a.rows);
    LinesAhead ahead;
    if (NR > 1) {
      if (n == c.begin && !c.asked) fetch(a.w + n * a.k, (stop - n) * a.k);
      const int64_t next = min_of(stop + step, stop < c.end ? c.end : c.ahead);
      const int64_t calls = all_panels * pieces * max_of(1, (stop - n) / NR);
      ahead = LinesAhead(a.w + stop * a.k, (next - stop) * a.k, calls);
    }
    // Panels of nearly the same height, as in linear.inl.
    int64_t panels = all_panels;
    for (int64_t m = 0; m < a.rows; --panels) {
      const int64_t mr = (a.rows - m + panels - 1) / panels;
      int8_panel<kInt8Rows>(a, mr, m, n, stop, &ahead);
      m += mr;
    }
  }
}

}  // namespace ellm::ELLM_ISA
