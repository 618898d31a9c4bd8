// Small matrix products in registers, in one of three arithmetics. All see 32-bit words: a word is
// a float32, or a pair of bfloat16 or four int8 that one instruction multiplies and adds. Along the
// words every element of the result is accumulated in order, one word at a time, so it has the same
// bits in a panel of any height.
#pragma once

#include <type_traits>

#include "kernels/cpu/rows.inl"

namespace ellm::ELLM_ISA {

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
#else
constexpr bool kHasPairs = false;
#endif

struct Floats {
  static constexpr int kPerWord = 1;  // elements
  static inline Vec spread(const float* word) { return splat(*word); }
  static inline Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
};

#if defined(__AVX512BF16__)
struct Pairs {
  static constexpr int kPerWord = 2;
  static inline Vec spread(const float* word) {
    int32_t bits;
    std::memcpy(&bits, word, sizeof bits);
    return reinterpret_cast<Vec>(_mm512_set1_epi32(bits));
  }
  static inline Vec multiply_add(Vec sum, Vec a, Vec b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};

// Four int8, multiplied exactly and summed in int32. The one side is signed, the other is not: K is
// made so, weights are.
struct Quads {
  static constexpr int kPerWord = 4;
  static inline Vec spread(const float* word) { return Pairs::spread(word); }
  static inline IVec multiply_add(IVec sum, Vec is_unsigned, Vec is_signed) {
    return reinterpret_cast<IVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum),
                                                      reinterpret_cast<__m512i>(is_unsigned),
                                                      reinterpret_cast<__m512i>(is_signed)));
  }
};
struct KeyQuads : Quads {
  static inline IVec multiply_add(IVec sum, Vec q, Vec k) { return Quads::multiply_add(sum, k, q); }
};
using WeightQuads = Quads;
#else
using Pairs = Floats;
using Quads = Floats;
#endif

// Whether elements of type S are int8, each row with a scale.
template <class S>
constexpr bool kScaled = sizeof(S) == 1;

// Whether words are of four int8.
template <class Arithmetic>
constexpr bool kInQuads = Arithmetic::kPerWord == 4;

// The arithmetic for q of type T with K and V of type S.
template <class T, class S>
using ArithmeticFor = std::conditional_t<kHasPairs && sizeof(T) == 2,
                                         std::conditional_t<kScaled<S>, Quads, Pairs>, Floats>;

// Rows and vectors of a panel, at most: the sums fill the register file beside the operands.
constexpr int kPanelRows = kLanes == 16 ? 6 : 3;
constexpr int kPanelVectors = 4;

struct Nothing {
  void operator()() const {}
};

// sums[m][n] += sum_i a[m, i] * b[i, n] for MR rows, NR vectors and i < words. Calls `beside` once
// for each word.
template <class Arithmetic, int MR, int NR, class Sum, class Beside = Nothing>
static inline void multiply_panel(const float* a, int64_t a_stride, const float* b,
                                  int64_t b_stride, int64_t words, Sum (&sums)[MR][NR],
                                  const Beside& beside = {}) {
  for (int64_t i = 0; i < words; ++i) {
    beside();
    Vec bv[NR];
    for (int n = 0; n < NR; ++n) bv[n] = load(b + i * b_stride + n * kLanes);
    for (int m = 0; m < MR; ++m) {
      const Vec av = Arithmetic::spread(a + m * a_stride + i);
      for (int n = 0; n < NR; ++n) {
        sums[m][n] = Arithmetic::multiply_add(sums[m][n], av, bv[n]);
      }
    }
  }
}

}  // namespace ellm::ELLM_ISA
