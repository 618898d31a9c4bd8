// Row-wise operations between the matrix products. They are here, and not left to XLA, because XLA
// picks the order of a reduction by the shape of the whole batch.
#include "kernels/cpu/gate.inl"
#include "kernels/cpu/rows.inl"

namespace ellm::ELLM_ISA {

template <class T>
static void rms_norm_typed(const T* x, const T* scale, T* out, int64_t rows, int64_t n, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += n, out += n) {
    Vec squares = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec v = load_up_to(x + i, n - i);
      squares += v * v;
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(n) + eps);
    for (int64_t i = 0; i < n; i += kLanes) {
      const Vec v = load_up_to(x + i, n - i) * inverse;
      store_part(out + i, v * load_up_to(scale + i, n - i), n - i);
    }
  }
}

static void rms_norm(const void* x, const void* scale, void* out, ElementType type, int64_t rows,
                     int64_t n, float eps) {
  if (type == ElementType::kFloat32) {
    rms_norm_typed(static_cast<const float*>(x), static_cast<const float*>(scale),
                   static_cast<float*>(out), rows, n, eps);
  } else {
    rms_norm_typed(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(scale),
                   static_cast<uint16_t*>(out), rows, n, eps);
  }
}

static void silu_mul(const void* x, void* out, ElementType type, int64_t rows, int64_t n) {
  if (type == ElementType::kFloat32) {
    silu_mul_typed(static_cast<const float*>(x), static_cast<float*>(out), rows, n);
  } else {
    silu_mul_typed(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(out), rows, n);
  }
}

}  // namespace ellm::ELLM_ISA
