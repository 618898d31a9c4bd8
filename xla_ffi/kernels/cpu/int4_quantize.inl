// Weights to steps of four bits and a float16 scale per group, when they are loaded.
#include "kernels/cpu/int4_kernels.h"
#include "kernels/cpu/rows.inl"

namespace ellm::ELLM_ISA {

constexpr int64_t kLargestGroup = 128;
constexpr uint16_t kHalfNaN = 0x7e00;

// The nearest float16, ties to even, of what is within its range.
static inline uint16_t to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x38800000u) {  // below the normal ones: whole steps of 2^-24
    const float size = x < 0 ? -x : x;
    const float rounded = size * 16777216.0f + 8388608.0f;  // 2^23 leaves the integer
    uint32_t whole;
    std::memcpy(&whole, &rounded, sizeof whole);
    return static_cast<uint16_t>(sign | (whole & 0x7ffu));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u) - (UINT32_C(112) << 23);
  return static_cast<uint16_t>(sign | rounded >> 13);
}

static inline float from_half(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  float x = static_cast<float>(magnitude) * 5.9604644775390625e-8f;  // 2^-24
  if (magnitude >= 0x400u) {
    const uint32_t bits = (magnitude << 13) + (UINT32_C(112) << 23);
    std::memcpy(&x, &bits, sizeof x);
  }
  return h & 0x8000u ? -x : x;
}

// The steps, less kInt4Zero, that are nearest to x / scale.
static inline Vec steps_of(Vec x, Vec inverse) {
  const Vec limited = vmin(vmax(x * inverse, splat(-8.0f)), splat(7.0f));
  return __builtin_convertvector(__builtin_convertvector(limited + splat(8.5f), IVec), Vec) -
         splat(8.0f);
}

// Squared error of a scale, and what the best scale for these steps follows from.
static inline float squared_error(const float* x, int64_t group, float scale, float* best) {
  Vec error = {}, product = {}, square = {};
  for (int64_t i = 0; i < group; i += kLanes) {
    const Vec v = load(x + i);
    const Vec q = steps_of(v, splat(1.0f / scale));
    const Vec off = v - q * splat(scale);
    error += off * off;
    product += v * q;
    square += q * q;
  }
  const float squares = sum(square);
  *best = squares > 0 ? sum(product) / squares : scale;
  return sum(error);
}

// Of scales near the extreme over -8, and the least squares fit to the steps of each, that with
// the least error. See Int4Kernels::quantize for what has none.
static inline uint16_t group_scale(const float* x, int64_t group) {
  float extreme = 0, largest = 0;
  for (int64_t i = 0; i < group; ++i) {
    const float size = x[i] < 0 ? -x[i] : x[i];
    if (!(size < 4e5f)) return kHalfNaN;
    if (size > largest) {
      largest = size;
      extreme = x[i];
    }
  }
  if (largest < 1e-6f) return 0;
  uint16_t chosen = 0;
  float least = 0;
  for (float divisor = -9.5f; divisor < -5.0f; divisor += 0.5f) {
    float scale = extreme / divisor;
    for (int attempt = 0; attempt < 2; ++attempt) {
      const uint16_t half = to_half(scale);
      const float held = from_half(half);
      if (held == 0 || !(held < 65504.0f && held > -65504.0f)) break;
      const float error = squared_error(x, group, held, &scale);
      if (chosen == 0 || error < least) {
        chosen = half;
        least = error;
      }
    }
  }
  return chosen;
}

static void int4_quantize(const void* x, ElementType type, int64_t rows, int64_t k, int64_t group,
                          uint8_t* values, uint16_t* scales) {
  const int64_t groups = (k + group - 1) / group;
  std::memset(scales, 0, groups * kInt4Columns * sizeof(uint16_t));
  for (int64_t g = 0; g < groups; ++g) {
    uint8_t steps[kInt4Columns * kLargestGroup];
    std::memset(steps, kInt4Zero, sizeof steps);
    const int64_t size = min_of(group, k - g * group);
    for (int64_t c = 0; c < rows; ++c) {
      alignas(64) float row[kLargestGroup];
      const char* from = static_cast<const char*>(x) + (c * k + g * group) * element_bytes(type);
      to_float(from, type, 1, size, group, row);
      const uint16_t half = group_scale(row, group);
      scales[g * kInt4Columns + c] = half;
      if (half == 0 || half == kHalfNaN) continue;
      const Vec inverse = splat(1.0f / from_half(half));
      for (int64_t i = 0; i < group; i += kLanes) {
        const IVec q = __builtin_convertvector(steps_of(load(row + i), inverse), IVec) + kInt4Zero;
        for (int j = 0; j < kLanes; ++j) steps[c * group + i + j] = static_cast<uint8_t>(q[j]);
      }
    }
    int4_pack(steps, kInt4Columns, group, group, kInt4Zero, values + g * 8 * group);
  }
}

}  // namespace ellm::ELLM_ISA
