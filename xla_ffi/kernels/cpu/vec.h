// Vectors of float32 in the width that the including file is compiled for, and the few
// operations the kernels need. Everything is in a namespace per instruction set: the same
// inline function compiled twice under one name would let the linker keep the wrong one.
// For the same reason no function of the standard library is called here.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/cpu/kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__)
#define ELLM_ISA avx512_bf16
#elif defined(__AVX512VNNI__)
#define ELLM_ISA avx512_vnni
#elif defined(__AVX512F__)
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
typedef int8_t BVec __attribute__((vector_size(kLanes)));
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

static inline Vec load(const int8_t* bytes) {
  // Compilers widen vectors of bytes one by one.
#if defined(__AVX512F__)
  __m128i b;
  std::memcpy(&b, bytes, sizeof b);
  const IVec wide = reinterpret_cast<IVec>(_mm512_maskz_cvtepi8_epi32(0xffff, b));
#elif defined(__AVX2__)
  int64_t b;
  std::memcpy(&b, bytes, sizeof b);
  const IVec wide = reinterpret_cast<IVec>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(b)));
#else
  BVec b;
  std::memcpy(&b, bytes, sizeof b);
  const IVec wide = __builtin_convertvector(b, IVec);
#endif
  return __builtin_convertvector(wide, Vec);
}

// The first n < kLanes elements, zeros behind them; reads nothing past them.
template <class T>
static inline Vec load_part(const T* p, int64_t n) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, n * sizeof(T));
  return load(padded);
}

// The first `left` elements, up to all lanes, zeros behind them.
template <class T>
static inline Vec load_up_to(const T* p, int64_t left) {
  return left >= kLanes ? load(p) : load_part(p, left);
}

static inline IVec lane_ids() {
  IVec v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

template <class V>
static inline V select(IVec mask, V a, V b) {
  return mask ? a : b;
}
// b where either is NaN.
static inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
static inline IVec vmax(IVec a, IVec b) { return a > b ? a : b; }
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

// to_bf16 of every lane.
static inline void store(uint16_t* bf16, Vec v) {
  UVec u;
  std::memcpy(&u, &v, sizeof u);
  const UVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const UVec nan = (u >> 16) | 0x40u;
  const HVec h = __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, HVec);
  std::memcpy(bf16, &h, sizeof h);
}

// The first n lanes, up to all of them.
template <class T>
static inline void store_part(T* p, Vec v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T lanes[kLanes];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
}

// v with lanes i and i ^ Stride exchanged.
template <int Stride, class V>
static inline V exchange(V v) {
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
template <int Count = kLanes, class V>
static inline V sum_each(const V* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    constexpr int kStride = Count / 2;
    const V a = sum_each<kStride>(vectors);
    const V b = sum_each<kStride>(vectors + kStride);
    const IVec upper = (lane_ids() & kStride) != 0;
    return select(upper, b, a) + exchange<kStride>(select(upper, a, b));
  }
}

// One stage of transpose(): vectors i and i + Stride exchange the lanes that differ in that bit.
template <int Stride>
static inline void swap_lanes(Vec* a, Vec* b) {
  const IVec upper = (lane_ids() & Stride) != 0;
  const Vec low = select(upper, exchange<Stride>(*b), *a);
  *b = select(upper, *b, exchange<Stride>(*a));
  *a = low;
}

// Lane j of vector i becomes lane i of vector j, for kLanes vectors.
template <int Stride = kLanes / 2>
static inline void transpose(Vec* v) {
  if constexpr (Stride > 0) {
    for (int i = 0; i < kLanes; ++i) {
      if ((i & Stride) == 0) swap_lanes<Stride>(v + i, v + i + Stride);
    }
    transpose<Stride / 2>(v);
  }
}

// The remaining strides of the tree: Stride, 2 * Stride, ...
template <int Stride, class V>
static inline V sum_strides(V v) {
  if constexpr (Stride < kLanes) {
    return sum_strides<Stride * 2>(v + exchange<Stride>(v));
  } else {
    return v;
  }
}

static inline float sum(Vec v) { return sum_strides<1>(v)[0]; }

// Every lane the largest of all, for strides from 1 on.
template <int Stride>
static inline IVec largest_strides(IVec v) {
  if constexpr (Stride < kLanes) {
    return largest_strides<Stride * 2>(vmax(v, exchange<Stride>(v)));
  } else {
    return v;
  }
}

// Lane i: the largest lane of vectors[i % Count], complete when Count == kLanes; no lane may be
// NaN.
template <int Count = kLanes, class V>
static inline V largest_each(const V* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    constexpr int kStride = Count / 2;
    const V a = largest_each<kStride>(vectors);
    const V b = largest_each<kStride>(vectors + kStride);
    const IVec upper = (lane_ids() & kStride) != 0;
    return vmax(select(upper, b, a), exchange<kStride>(select(upper, a, b)));
  }
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

enum class Accuracy { kFull, kBFloat16 };

// 2^x for x <= 0, to about 3 ulp or to 1.1e-4 of it; exact for whole x; 0 below -126, which
// includes minus infinity; NaN stays NaN.
template <Accuracy accuracy = Accuracy::kFull>
static inline Vec exp2_negative(Vec x) {
#if defined(__AVX512F__)
  const Vec n =
      _mm512_maskz_roundscale_ps(0xffff, x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = shifted - 12582912.0f;
#endif
  const Vec r = x - n;
  Vec p;
  if constexpr (accuracy == Accuracy::kFull) {
    p = splat(1.326472731e-03f);
    p = p * r + 9.671512991e-03f;
    p = p * r + 5.550733581e-02f;
    p = p * r + 2.402224243e-01f;
    p = p * r + 6.931470037e-01f;
  } else {
    p = splat(5.500893295e-02f);
    p = p * r + 2.422109693e-01f;
    p = p * r + 6.932829022e-01f;
  }
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, splat(-126.0f), _CMP_NLT_UQ), p, n);
#else
  UVec exponent, bits;  // the integer is in the low bits of `shifted`
  std::memcpy(&exponent, &shifted, sizeof exponent);
  std::memcpy(&bits, &p, sizeof bits);
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof p);
  return select(x < splat(-126.0f), Vec{}, p);
#endif
}

static inline Vec tanh(Vec x) { return 1.0f - 2.0f / (exp(x + x) + 1.0f); }

}  // namespace ellm::ELLM_ISA
