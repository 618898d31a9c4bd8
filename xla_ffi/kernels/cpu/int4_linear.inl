// Linear layers of int4: rows of x against panels of weights. An output is a lane, to which the
// groups are added in order, so it has the same bits in a block of any height and width.
#include "kernels/cpu/int4_dot.inl"

namespace ellm::ELLM_ISA {

// Panels that share each load of x where there are many rows, and rows that share each load of NP
// panels, at most: the sums of a block fill the register file beside the operands.
constexpr int kInt4Panels = kLanes == 16 ? 2 : 1;
constexpr int int4_rows_of(int panels) {
  return kLanes == 16 ? (panels == 1 ? 8 : 6) : kLanes == 8 ? 3 : 2;
}

// Few rows wait for the weights. Panel by panel these are one stretch of memory, asked for so many
// bytes ahead: more than the processor looks ahead by itself.
constexpr int64_t kAheadBytes = 4096;
constexpr int64_t kAheadScales = 256;

constexpr int64_t kBytesPerEight = 4 * kInt4Columns;

static inline IVec splat_int(int32_t x) { return x - IVec{}; }

// totals[m][p][v] += sum_i x[m, i] * w[p, i] of the steps of one group.
template <int MR, int NP>
static inline void multiply_group(const int8_t* x, int64_t x_stride, const uint8_t* w,
                                  int64_t panel_bytes, int64_t group,
                                  IVec (&totals)[MR][NP][kVectors]) {
  for (int64_t part = 0; part < group; part += 32) {
    typename Steps::Sums sums[MR][NP][kVectors];
    for (int m = 0; m < MR; ++m) {
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) sums[m][p][v] = Steps::begin(totals[m][p][v]);
      }
    }
#pragma GCC unroll 4
    for (int64_t i = part; i < part + 32; i += 8) {
      typename Steps::Weights low[NP][kVectors], high[NP][kVectors];
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          const uint8_t* at = w + p * panel_bytes + i / 8 * kBytesPerEight + v * kLanes * 4;
          if (NP == 1 && v == 0) __builtin_prefetch(at + kAheadBytes);
          Steps::weights(at, &low[p][v], &high[p][v]);
        }
      }
      for (int m = 0; m < MR; ++m) {
        const auto first = Steps::inputs(x + m * x_stride + i);
        const auto second = Steps::inputs(x + m * x_stride + i + 4);
        for (int p = 0; p < NP; ++p) {
          for (int v = 0; v < kVectors; ++v) {
            sums[m][p][v] = Steps::multiply_add(sums[m][p][v], low[p][v], first);
            sums[m][p][v] = Steps::multiply_add(sums[m][p][v], high[p][v], second);
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int p = 0; p < NP; ++p) {
        for (int v = 0; v < kVectors; ++v) {
          totals[m][p][v] = Steps::end(totals[m][p][v], sums[m][p][v]);
        }
      }
    }
  }
}

// Rows [m, m + MR) of NP panels from `panel` on.
template <int MR, int NP, bool HasZeros, class Out>
static inline void int4_block(const Int4Args& a, int64_t m, int64_t panel) {
  const int64_t groups = a.w.groups();
  const int64_t group = a.w.group;
  const int64_t panel_bytes = groups * group / 8 * kBytesPerEight;
  const int64_t row_scales = m * groups;
  Vec out[MR][NP][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t columns = (panel * groups + g) * kInt4Columns;
    const int32_t* x_sums = a.x.sums + row_scales + g;
    const float* x_scales = a.x.scales + row_scales + g;
    if (NP == 1) __builtin_prefetch(a.w.scales + columns + kAheadScales);
    IVec totals[MR][NP][kVectors];
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        if constexpr (HasZeros) {
          const IVec zeros =
              load_zeros(a.w.zeros + columns + p * groups * kInt4Columns + v * kLanes);
          for (int i = 0; i < MR; ++i) totals[i][p][v] = zeros * splat_int(-x_sums[i * groups]);
        } else {
          for (int i = 0; i < MR; ++i) {
            totals[i][p][v] = splat_int(-kInt4Zero * x_sums[i * groups]);
          }
        }
      }
    }
    multiply_group<MR, NP>(a.x.values + m * a.x.stride + g * group, a.x.stride,
                           a.w.values + panel * panel_bytes + g * group / 8 * kBytesPerEight,
                           panel_bytes, group, totals);
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const Vec scales = load_half(a.w.scales + columns + p * groups * kInt4Columns + v * kLanes);
        for (int i = 0; i < MR; ++i) {
          const Vec scale = scales * splat(x_scales[i * groups]);
          out[i][p][v] += __builtin_convertvector(totals[i][p][v], Vec) * scale;
        }
      }
    }
  }
  for (int i = 0; i < MR; ++i) {
    for (int p = 0; p < NP; ++p) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t n = (panel + p) * kInt4Columns + v * kLanes;
        if (n >= a.w.n) continue;
        store_part(static_cast<Out*>(a.out) + (m + i) * a.w.n + n, out[i][p][v], a.w.n - n);
      }
    }
  }
}

// int4_block for `mr` rows, 1 to MR.
template <int MR, int NP, bool HasZeros, class Out>
static inline void int4_rows(const Int4Args& a, int64_t mr, int64_t m, int64_t panel) {
  if (mr == MR) return int4_block<MR, NP, HasZeros, Out>(a, m, panel);
  if constexpr (MR > 1) int4_rows<MR - 1, NP, HasZeros, Out>(a, mr, m, panel);
}

template <int NP, bool HasZeros, class Out>
static inline void int4_panels(const Int4Args& a, int64_t panel) {
  // Blocks of nearly the same height.
  constexpr int kRows = int4_rows_of(NP);
  int64_t blocks = (a.rows + kRows - 1) / kRows;
  for (int64_t m = 0; m < a.rows; --blocks) {
    const int64_t mr = (a.rows - m + blocks - 1) / blocks;
    int4_rows<kRows, NP, HasZeros, Out>(a, mr, m, panel);
    m += mr;
  }
}

template <bool HasZeros, class Out>
static void int4_linear_typed(const Int4Args& a, int64_t begin, int64_t end) {
  int64_t panel = begin;
  if (a.rows > int4_rows_of(1)) {
    for (; panel + kInt4Panels <= end; panel += kInt4Panels) {
      int4_panels<kInt4Panels, HasZeros, Out>(a, panel);
    }
  }
  for (; panel < end; ++panel) int4_panels<1, HasZeros, Out>(a, panel);
}

template <class Out>
static void int4_linear_into(const Int4Args& a, int64_t begin, int64_t end) {
  if (a.w.zeros == nullptr) {
    int4_linear_typed<false, Out>(a, begin, end);
  } else {
    int4_linear_typed<true, Out>(a, begin, end);
  }
}

static void int4_linear(const Int4Args& a, int64_t begin, int64_t end) {
  if (a.out_type == ElementType::kFloat32) {
    int4_linear_into<float>(a, begin, end);
  } else {
    int4_linear_into<uint16_t>(a, begin, end);
  }
}

}  // namespace ellm::ELLM_ISA
