// Rows of numbers to int8 values and a scale: activations at run time, weights when they are
// loaded.
#include "kernels/cpu/int8_kernels.h"
#include "kernels/cpu/vec.h"

namespace ellm::ELLM_ISA {

// Below it a row counts as zero. Its scale would be subnormal, which XLA's threads flush to zero.
constexpr float kSmallestMagnitude = 1e-30f;

static inline IVec bits_of(Vec v) {
  IVec bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}

// The bits of the largest |x|. Compared as integers infinities and NaNs come out on top.
template <class T>
static inline int32_t largest_magnitude(const T* x, int64_t k) {
  IVec most = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    const IVec bits = bits_of(load_up_to(x + i, k - i)) & 0x7fffffff;
    most = bits > most ? bits : most;
  }
  int32_t top = 0;
  for (int i = 0; i < kLanes; ++i) top = most[i] > top ? most[i] : top;
  return top;
}

// To the nearest integer, ties to even, for |v| < 2^22: adding 1.5 * 2^23 leaves the integer in the
// low bits. v has to be the result of a division, for a product would be contracted with the
// addition where the instruction set can, and rounded once instead of twice.
static inline IVec round_to_int(Vec v) { return bits_of(v + splat(12582912.0f)) - 0x4b400000; }

template <class T>
static int32_t quantize_row(const T* x, int64_t k, float scale, int8_t* values) {
  IVec total = {};
  for (int64_t i = 0; i < k; i += kLanes) {
    const IVec q = round_to_int(load_up_to(x + i, k - i) / splat(scale));
    total += q;
    const BVec bytes = __builtin_convertvector(q, BVec);
    std::memcpy(values + i, &bytes, min_of(kLanes, k - i));
  }
  return sum_strides<1>(total)[0];
}

template <class T>
static void quantize_typed(const T* x, int64_t rows, int64_t k, const Int8Rows& to) {
  for (int64_t m = 0; m < rows; ++m) {
    const int32_t bits = largest_magnitude(x + m * k, k);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    int8_t* values = to.values + m * to.stride;
    int32_t total = 0;
    int64_t written = 0;
    if (bits >= 0x7f800000) {
      to.scales[m] = __builtin_nanf("");
    } else if (largest < kSmallestMagnitude) {
      to.scales[m] = 0.0f;
    } else {
      to.scales[m] = largest / 127.0f;
      total = quantize_row(x + m * k, k, to.scales[m], values);
      written = k;
    }
    std::memset(values + written, 0, to.stride - written);
    if (to.sums != nullptr) to.sums[m] = total;
  }
}

static void int8_quantize(const void* x, ElementType type, int64_t rows, int64_t k,
                          const Int8Rows& to) {
  if (type == ElementType::kFloat32) {
    quantize_typed(static_cast<const float*>(x), rows, k, to);
  } else {
    quantize_typed(static_cast<const uint16_t*>(x), rows, k, to);
  }
}

}  // namespace ellm::ELLM_ISA
