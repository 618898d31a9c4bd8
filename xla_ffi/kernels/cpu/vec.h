// Vectors of float32 in the width that the including file is compiled for, and the few
// operations the kernels need. Everything is in a namespace per instruction set: the same
// inline function compiled twice under one name would let the linker keep the wrong one.
// For the same reason no function of the standard library is called here.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/kernels.h"

#if defined(__AVX512F__)
#define ELLM_ISA avx512
#elif defined(__AVX2__)
#define ELLM_ISA avx2
#else
#define ELLM_ISA generic
#endif

namespace ellm::ELLM_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

static inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

static inline Vec splat(float x) { return x - Vec{}; }

static inline Vec load(const uint16_t* bf16) {
  HVec h;
  std::memcpy(&h, bf16, sizeof h);
  const UVec u = __builtin_convertvector(h, UVec) << 16;
  Vec v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

// The first n < kLanes elements, zeros behind them; reads nothing past them.
template <class T>
static inline Vec load_part(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

static inline IVec lane_ids() {
  IVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

static inline Vec select(IVec mask, Vec a, Vec b) { return mask ? a : b; }
// b where either is NaN.
static inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline void put(float* p, float x) { *p = x; }
static inline void put(uint16_t* p, float x) { *p = to_bf16(x); }

// v with lanes i and i ^ Stride exchanged.
template <int Stride>
static inline Vec exchange(Vec v) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(v, v, 0 ^ Stride, 1 ^ Stride, 2 ^ Stride, 3 ^ Stride, 4 ^ Stride,
                                 5 ^ Stride, 6 ^ Stride, 7 ^ Stride, 8 ^ Stride, 9 ^ Stride,
                                 10 ^ Stride, 11 ^ Stride, 12 ^ Stride, 13 ^ Stride, 14 ^ Stride,
                                 15 ^ Stride);
#elif defined(__AVX2__)
  return __builtin_shufflevector(v, v, 0 ^ Stride, 1 ^ Stride, 2 ^ Stride, 3 ^ Stride, 4 ^ Stride,
                                 5 ^ Stride, 6 ^ Stride, 7 ^ Stride);
#else
  return __builtin_shufflevector(v, v, 0 ^ Stride, 1 ^ Stride, 2 ^ Stride, 3 ^ Stride);
#endif
}

// Lane i: the sum over the lanes of vectors[i % Count], complete when Count == kLanes. Each sum
// is taken by the butterfly tree of sum(): strides 1, 2, 4, ...
template <int Count = kLanes>
static inline Vec sum_each(const Vec* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    constexpr int kStride = Count / 2;
    const Vec a = sum_each<kStride>(vectors);
    const Vec b = sum_each<kStride>(vectors + kStride);
    const IVec upper = (lane_ids() & kStride) != 0;
    return select(upper, b, a) + exchange<kStride>(select(upper, a, b));
  }
}

// The remaining strides of the tree: Stride, 2 * Stride, ...
template <int Stride>
static inline Vec sum_strides(Vec v) {
  if constexpr (Stride < kLanes) {
    return sum_strides<Stride * 2>(v + exchange<Stride>(v));
  } else {
    return v;
  }
}

static inline float sum(Vec v) { return sum_strides<1>(v)[0]; }

// The largest lane; no lane may be NaN.
static inline float largest(Vec v) {
#if defined(__AVX512F__)
  v = vmax(v, exchange<8>(v));
#endif
#if defined(__AVX2__)
  v = vmax(v, exchange<4>(v));
#endif
  v = vmax(v, exchange<2>(v));
  return vmax(v, exchange<1>(v))[0];
}

// e^x to about 1 ulp; 0 below -87.3, which includes minus infinity; NaN stays NaN.
static inline Vec exp(Vec x) {
  const Vec clamped = vmax(splat(-87.4f), vmin(splat(88.3f), x));
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  IVec bits;
  std::memcpy(&bits, &p, sizeof bits);
  bits += __builtin_convertvector(n, IVec) << 23;
  std::memcpy(&p, &bits, sizeof p);
  return select(x < splat(-87.3f), Vec{}, p);
}

static inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

}  // namespace ellm::ELLM_ISA
