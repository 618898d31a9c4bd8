// Linear layers over int8 weights in panels, where there is an instruction that multiplies four
// bytes by four and adds the products to one sum.
#include "kernels/cpu/int8_linear.inl"
#include "kernels/cpu/panel_tiles.inl"

namespace ellm::ELLM_ISA {

#if defined(__AVX512VNNI__)

struct Int8Panels {
  using Sum = IVec;
  using Args = Int8Args;

  static inline int64_t words(const Int8Args& a) { return a.k / kWordBytes; }

  template <int MR, int NV, bool kWhole>
  static inline void add(const Int8Args& a, int64_t m, int64_t word, const char* w, int64_t columns,
                         IVec* acc) {
    const int8_t* x = a.x.values + m * a.x.stride + word * kWordBytes;
    // Unsigned, as int8_dot.inl says.
    UVec weights[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) weights[v] = word_vector<kWhole>(w, columns, v) ^ 0x80808080u;
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      int32_t four;
      std::memcpy(&four, x + i * a.x.stride, sizeof four);
      const __m512i xv = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        acc[i * NV + v] =
            Bytes::multiply_add(acc[i * NV + v], reinterpret_cast<__m512i>(weights[v]), xv);
      }
    }
  }

  static inline Vec number(const Int8Args& a, int64_t m, int64_t n, IVec sum, int64_t columns) {
    return scaled(sum, Bytes::kOffset * a.x.sums[m], a.x.scales[m], a.w_scale + n, columns);
  }
};

static void int8_linear_panels(const Int8Args& a, const Columns& columns) {
  panel_columns<Int8Panels>(a, columns);
}

#endif

}  // namespace ellm::ELLM_ISA
