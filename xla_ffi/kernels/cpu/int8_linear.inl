// Linear layers of int8: rows of x against rows of w, both running along k, as in linear.inl.
#include "kernels/cpu/int8_dot.inl"

namespace ellm::ELLM_ISA {

// Rows of x that share each load of w, at most.
constexpr int kInt8Rows = kLanes == 16 ? 6 : 3;

// Columns of a block of MR rows: its sums fill the register file beside the operands.
constexpr int int8_columns(int mr) {
  if (kLanes == 16) return mr == 1 ? 16 : mr <= 3 ? 8 : 4;
  return mr == 1 ? 8 : 4;
}

// Columns whose sums wait to be scaled together. A multiple of what blocks take.
constexpr int64_t kInt8Columns = 48;

// Elements along k that a high panel takes at a time: such a piece of x stays in the level-1 cache
// while w passes. Low panels wait for w in any case.
constexpr int64_t kInt8Depth = 4096;

// Bytes of w that stay in the level-2 cache while all rows of x pass them.
constexpr int64_t kInt8BlockBytes = 256 * 1024;

// to[i] = sum of vectors[i]; in groups of a power of two; writes up to kLanes words more.
template <int Count, int Group = kLanes>
static inline void sum_words(const IVec* vectors, int32_t* to) {
  if constexpr (Group > Count) {
    sum_words<Count, Group / 2>(vectors, to);
  } else {
    const IVec sums = sum_strides<Group>(sum_each<Group>(vectors));
    std::memcpy(to, &sums, sizeof sums);
    if constexpr (Count > Group) sum_words<Count - Group, Group>(vectors + Group, to + Group);
  }
}

// sums[m, j] += sum_i (w[j, i] + kOffset) * x[m, i] for MR rows, NR columns and i in [begin, end);
// `begin` is a multiple of kInt8Padding, and so is `end` unless it is k.
template <int MR, int NR>
static inline void int8_block(const int8_t* x, int64_t x_stride, const int8_t* w, int64_t k,
                              int64_t begin, int64_t end, int32_t* sums) {
  IVec acc[MR * NR] = {};
  const int64_t full = end / Bytes::kWidth * Bytes::kWidth;
  for (int64_t i = begin; i < full; i += Bytes::kWidth) {
    typename Bytes::Operand xv[MR];
    for (int m = 0; m < MR; ++m) xv[m] = Bytes::inputs(x + m * x_stride + i);
    for (int j = 0; j < NR; ++j) {
      const auto wv = Bytes::weights(w + j * k + i);
      for (int m = 0; m < MR; ++m) {
        acc[m * NR + j] = Bytes::multiply_add(acc[m * NR + j], wv, xv[m]);
      }
    }
  }
  if (full < end) {  // x is padded, w is not
    typename Bytes::Operand xv[MR];
    for (int m = 0; m < MR; ++m) xv[m] = Bytes::inputs(x + m * x_stride + full);
    for (int j = 0; j < NR; ++j) {
      int8_t padded[Bytes::kWidth] = {};
      std::memcpy(padded, w + j * k + full, end - full);
      const auto wv = Bytes::weights(padded);
      for (int m = 0; m < MR; ++m) {
        acc[m * NR + j] = Bytes::multiply_add(acc[m * NR + j], wv, xv[m]);
      }
    }
  }
  int32_t added[MR * NR + kLanes];
  sum_words<MR * NR>(acc, added);
  for (int m = 0; m < MR; ++m) {
    for (int j = 0; j < NR; ++j) sums[m * kInt8Columns + j] += added[m * NR + j];
  }
}

// out = float(sums - correction) * x_scale * w_scale for `count` columns of a row.
template <class Out>
static inline void scale_row(const int32_t* sums, int32_t correction, float x_scale,
                             const float* w_scale, int64_t count, Out* out) {
  for (int64_t i = 0; i < count; i += kLanes) {
    IVec s;
    std::memcpy(&s, sums + i, sizeof s);  // kInt8Columns is a multiple of kLanes
    const Vec v = __builtin_convertvector(s - correction, Vec) * splat(x_scale);
    store_part(out + i, v * load_up_to(w_scale + i, count - i), count - i);
  }
}

// Rows [m, m + MR) and at most kInt8Columns columns.
template <int MR, class Out>
static inline void int8_rows(const Int8Args& a, int64_t m, int64_t n_begin, int64_t n_end) {
  constexpr int NR = int8_columns(MR);
  const int8_t* x = a.x.values + m * a.x.stride;
  int32_t sums[MR * kInt8Columns] = {};
  const int64_t depth = 3 * MR > 2 * kInt8Rows ? kInt8Depth : a.k;
  for (int64_t begin = 0; begin < a.k; begin += depth) {
    const int64_t end = min_of(begin + depth, a.k);
    int64_t n = n_begin;
    int32_t* at = sums;
    for (; n + NR <= n_end; n += NR, at += NR) {
      int8_block<MR, NR>(x, a.x.stride, a.w + n * a.k, a.k, begin, end, at);
    }
    for (; n < n_end; ++n, ++at) {
      int8_block<MR, 1>(x, a.x.stride, a.w + n * a.k, a.k, begin, end, at);
    }
  }
  Out* out = static_cast<Out*>(a.out) + m * a.n + n_begin;
  for (int i = 0; i < MR; ++i) {
    scale_row(sums + i * kInt8Columns, Bytes::kOffset * a.x.sums[m + i], a.x.scales[m + i],
              a.w_scale + n_begin, n_end - n_begin, out + i * a.n);
  }
}

// int8_rows for `mr` rows, 1 to MR.
template <int MR, class Out>
static inline void int8_panel(const Int8Args& a, int64_t mr, int64_t m, int64_t n_begin,
                              int64_t n_end) {
  if (mr == MR) return int8_rows<MR, Out>(a, m, n_begin, n_end);
  if constexpr (MR > 1) int8_panel<MR - 1, Out>(a, mr, m, n_begin, n_end);
}

template <class Out>
static void int8_linear_typed(const Int8Args& a, int64_t n_begin, int64_t n_end) {
  // Multiples of 8 leave no columns over for the blocks of high panels.
  const int64_t fitting = max_of(8, kInt8BlockBytes / a.k / 8 * 8);
  const int64_t step = a.rows <= kInt8Rows ? kInt8Columns : min_of(kInt8Columns, fitting);
  for (int64_t n = n_begin; n < n_end; n += step) {
    const int64_t stop = min_of(n + step, n_end);
    // Panels of nearly the same height, as in linear.inl.
    int64_t panels = (a.rows + kInt8Rows - 1) / kInt8Rows;
    for (int64_t m = 0; m < a.rows; --panels) {
      const int64_t mr = (a.rows - m + panels - 1) / panels;
      int8_panel<kInt8Rows, Out>(a, mr, m, n, stop);
      m += mr;
    }
  }
}

static void int8_linear(const Int8Args& a, int64_t n_begin, int64_t n_end) {
  if (a.out_type == ElementType::kFloat32) {
    int8_linear_typed<float>(a, n_begin, n_end);
  } else {
    int8_linear_typed<uint16_t>(a, n_begin, n_end);
  }
}

}  // namespace ellm::ELLM_ISA
