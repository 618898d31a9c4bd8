// Products of int8 summed in int32, in what the instruction set has for it. Bytes::kWidth elements
// at a time; kOffset is what was added to each weight to make it unsigned.
#include "kernels/cpu/int8_kernels.h"
#include "kernels/cpu/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ellm::ELLM_ISA {

#if defined(__AVX512VNNI__)

// The instruction takes unsigned by signed: w + 128 is w with its highest bit flipped, and 128
// times the sum of x is taken away at the end.
struct Bytes {
  using Operand = __m512i;
  static constexpr int64_t kWidth = 64;
  static constexpr int32_t kOffset = 128;
  static inline Operand weights(const int8_t* p) {
    return _mm512_xor_si512(_mm512_loadu_si512(p), _mm512_set1_epi32(INT32_C(-2139062144)));
  }
  static inline Operand inputs(const int8_t* p) { return _mm512_loadu_si512(p); }
  static inline IVec multiply_add(IVec sum, Operand w, Operand x) {
    return reinterpret_cast<IVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), w, x));
  }
};

#elif defined(__AVX512BW__)

// Widened to int16, for the products of bytes that these sets have saturate.
struct Bytes {
  using Operand = __m512i;
  static constexpr int64_t kWidth = 32;
  static constexpr int32_t kOffset = 0;
  static inline Operand weights(const int8_t* p) {
    __m256i bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return _mm512_cvtepi8_epi16(bytes);
  }
  static inline Operand inputs(const int8_t* p) { return weights(p); }
  static inline IVec multiply_add(IVec sum, Operand w, Operand x) {
    return sum + reinterpret_cast<IVec>(_mm512_madd_epi16(w, x));
  }
};

#elif defined(__AVX2__)

struct Bytes {
  using Operand = __m256i;
  static constexpr int64_t kWidth = 16;
  static constexpr int32_t kOffset = 0;
  static inline Operand weights(const int8_t* p) {
    __m128i bytes;
    std::memcpy(&bytes, p, sizeof bytes);
    return _mm256_cvtepi8_epi16(bytes);
  }
  static inline Operand inputs(const int8_t* p) { return weights(p); }
  static inline IVec multiply_add(IVec sum, Operand w, Operand x) {
    return sum + reinterpret_cast<IVec>(_mm256_madd_epi16(w, x));
  }
};

#else

// The sum of two products fits an int16: 2 * 127 * 127 = 32258.
struct Bytes {
  typedef int8_t Eight __attribute__((vector_size(8)));
  typedef int16_t Words __attribute__((vector_size(16)));
  typedef int16_t Half __attribute__((vector_size(8)));
  struct Operand {
    Words first, second;
  };
  static constexpr int64_t kWidth = 16;
  static constexpr int32_t kOffset = 0;
  static inline Operand weights(const int8_t* p) {
    Eight first, second;
    std::memcpy(&first, p, 8);
    std::memcpy(&second, p + 8, 8);
    return {__builtin_convertvector(first, Words), __builtin_convertvector(second, Words)};
  }
  static inline Operand inputs(const int8_t* p) { return weights(p); }
  static inline IVec multiply_add(IVec sum, const Operand& w, const Operand& x) {
    const Words p = w.first * x.first + w.second * x.second;
    const Half low = __builtin_shufflevector(p, p, 0, 1, 2, 3);
    const Half high = __builtin_shufflevector(p, p, 4, 5, 6, 7);
    return sum + __builtin_convertvector(low, IVec) + __builtin_convertvector(high, IVec);
  }
};

#endif

}  // namespace ellm::ELLM_ISA
