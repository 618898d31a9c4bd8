// Products of steps (0 to 15) and int8 activations for the columns of a vector, four inputs at a
// time, in what the instruction set has for it. Sums take the products of at most 32 inputs before
// they are added to the int32 totals; kVectors of them make a panel.
#include "kernels/cpu/int4_kernels.h"
#include "kernels/cpu/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ellm::ELLM_ISA {

constexpr int kVectors = static_cast<int>(kInt4Columns) / kLanes;

#if defined(__AVX512F__)

struct Steps {
  using Weights = __m512i;
  using Inputs = __m512i;
  using Sums = __m512i;
  static inline Inputs inputs(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static inline void weights(const uint8_t* p, Weights* low, Weights* high) {
    const __m512i both = _mm512_loadu_si512(p);
    const __m512i mask = _mm512_set1_epi8(15);
    *low = _mm512_and_si512(both, mask);
    *high = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
  }
#if defined(__AVX512VNNI__)
  static inline Sums begin(IVec total) { return reinterpret_cast<Sums>(total); }
  static inline Sums multiply_add(Sums sums, Weights w, Inputs x) {
    return _mm512_dpbusd_epi32(sums, w, x);
  }
  static inline IVec end(IVec, Sums sums) { return reinterpret_cast<IVec>(sums); }
#else
  // Pairs in int16: 32 inputs sum to at most 16 * 15 * 127 = 30480.
  static inline Sums begin(IVec) { return _mm512_setzero_si512(); }
  static inline Sums multiply_add(Sums sums, Weights w, Inputs x) {
    return _mm512_add_epi16(sums, _mm512_maddubs_epi16(w, x));
  }
  static inline IVec end(IVec total, Sums sums) {
    return total + reinterpret_cast<IVec>(_mm512_madd_epi16(sums, _mm512_set1_epi16(1)));
  }
#endif
};

static inline Vec load_half(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, halves));
}

#elif defined(__AVX2__)

struct Steps {
  using Weights = __m256i;
  using Inputs = __m256i;
  using Sums = __m256i;
  static inline Inputs inputs(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, sizeof word);
    return _mm256_set1_epi32(word);
  }
  static inline void weights(const uint8_t* p, Weights* low, Weights* high) {
    const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i mask = _mm256_set1_epi8(15);
    *low = _mm256_and_si256(both, mask);
    *high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
  }
  // Pairs in int16: 32 inputs sum to at most 16 * 15 * 127 = 30480.
  static inline Sums begin(IVec) { return _mm256_setzero_si256(); }
  static inline Sums multiply_add(Sums sums, Weights w, Inputs x) {
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x));
  }
  static inline IVec end(IVec total, Sums sums) {
    return total + reinterpret_cast<IVec>(_mm256_madd_epi16(sums, _mm256_set1_epi16(1)));
  }
};

static inline Vec load_half(const uint16_t* p) {
  return reinterpret_cast<Vec>(
      _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

#else

// In int16, each of the four inputs apart: 32 inputs sum to at most 8 * 15 * 127 = 15240.
struct Steps {
  typedef uint8_t Eight __attribute__((vector_size(8)));
  typedef int8_t Four __attribute__((vector_size(4)));
  typedef int16_t Words __attribute__((vector_size(16)));
  typedef int16_t Half __attribute__((vector_size(8)));
  struct Weights {
    Words first, second;  // two columns each
  };
  using Sums = Weights;
  using Inputs = Words;
  static inline Inputs inputs(const int8_t* four) {
    Four bytes;
    std::memcpy(&bytes, four, sizeof bytes);
    const Half half = __builtin_convertvector(bytes, Half);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3, 4, 5, 6, 7);
  }
  static inline void weights(const uint8_t* p, Weights* low, Weights* high) {
    Eight bytes[2];
    std::memcpy(bytes, p, sizeof bytes);
    low->first = __builtin_convertvector(bytes[0] & 15, Words);
    low->second = __builtin_convertvector(bytes[1] & 15, Words);
    high->first = __builtin_convertvector(bytes[0] >> 4, Words);
    high->second = __builtin_convertvector(bytes[1] >> 4, Words);
  }
  static inline Sums begin(IVec) { return {Words{}, Words{}}; }
  static inline Sums multiply_add(const Sums& sums, const Weights& w, Inputs x) {
    return {sums.first + w.first * x, sums.second + w.second * x};
  }
  static inline IVec end(IVec total, const Sums& sums) {
    for (int c = 0; c < 4; ++c) {
      const Words& of = c < 2 ? sums.first : sums.second;
      for (int b = 0; b < 4; ++b) total[c] += of[c % 2 * 4 + b];
    }
    return total;
  }
};

// Without numbers below the range of float32, which XLA's threads flush to zero.
static inline Vec load_half(const uint16_t* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  const UVec bits = __builtin_convertvector(h, UVec);
  const UVec magnitude = bits & 0x7fff;
  const UVec rebiased = (magnitude << 13) + (UINT32_C(112) << 23);
  const UVec shifted = magnitude < 0x7c00u ? rebiased : rebiased + (UINT32_C(112) << 23);
  Vec normal;
  std::memcpy(&normal, &shifted, sizeof normal);
  const IVec whole = __builtin_convertvector(magnitude, IVec);
  const Vec small = __builtin_convertvector(whole, Vec) * 5.9604644775390625e-8f;  // 2^-24
  const Vec value = select(whole < 0x400, small, normal);
  return select(__builtin_convertvector(bits, IVec) > 0x7fff, -value, value);
}

#endif

// Zero points as int32.
static inline IVec load_zeros(const uint8_t* p) {
  typedef uint8_t Packed __attribute__((vector_size(kLanes)));
  Packed bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, IVec);
}

}  // namespace ellm::ELLM_ISA
