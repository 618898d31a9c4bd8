// Linear layers over bfloat16 weights in panels.
#include "kernels/cpu/panel.inl"
#include "kernels/cpu/panel_tiles.inl"

namespace ellm::ELLM_ISA {

struct PanelSums {
  using Sum = Vec;
  using Args = LinearArgs;

  static inline int64_t words(const LinearArgs& a) { return a.k / 2; }
  static inline Vec number(const LinearArgs&, int64_t, int64_t, Vec sum, int64_t) { return sum; }
};

// x is float32: of a pair the first product is added, then the second.
struct WidenedPanels : PanelSums {
  template <int MR, int NV, bool kWhole>
  static inline void add(const LinearArgs& a, int64_t m, int64_t word, const char* w,
                         int64_t columns, Vec* acc) {
    const float* x = static_cast<const float*>(a.x) + m * a.x_stride + 2 * word;
    Vec first[NV], second[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      const UVec both = word_vector<kWhole>(w, columns, v);
      const UVec low = both << 16, high = both & 0xffff0000u;
      std::memcpy(&first[v], &low, sizeof low);
      std::memcpy(&second[v], &high, sizeof high);
    }
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Vec x0 = splat(x[i * a.x_stride]), x1 = splat(x[i * a.x_stride + 1]);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        acc[i * NV + v] = acc[i * NV + v] + x0 * first[v];
        acc[i * NV + v] = acc[i * NV + v] + x1 * second[v];
      }
    }
  }
};

#if defined(__AVX512BF16__)
struct PairPanels : PanelSums {
  template <int MR, int NV, bool kWhole>
  static inline void add(const LinearArgs& a, int64_t m, int64_t word, const char* w,
                         int64_t columns, Vec* acc) {
    const uint16_t* x = static_cast<const uint16_t*>(a.x) + m * a.x_stride + 2 * word;
    Vec both[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v)
      both[v] = reinterpret_cast<Vec>(word_vector<kWhole>(w, columns, v));
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Vec xv = Pairs::spread(reinterpret_cast<const float*>(x + i * a.x_stride));
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        acc[i * NV + v] = Pairs::multiply_add(acc[i * NV + v], xv, both[v]);
      }
    }
  }
};
#endif

static void linear_panels(const LinearArgs& a, const Columns& columns) {
#if defined(__AVX512BF16__)
  if (a.x_type == ElementType::kBFloat16) return panel_columns<PairPanels>(a, columns);
#endif
  panel_columns<WidenedPanels>(a, columns);
}

}  // namespace ellm::ELLM_ISA
