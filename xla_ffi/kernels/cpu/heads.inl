// The heads of fused projections: parted, normalised and rotated in one pass.
#include "kernels/cpu/norm.inl"

namespace ellm::ELLM_ISA {

// Turns element i of a head with element i + dim / 2.
template <class T>
static inline void rotate_head(const T* head, const float* cos, const float* sin, int64_t half,
                               T* out) {
  for (int64_t i = 0; i < half; i += kLanes) {
    const Vec c = load_up_to(cos + i, half - i);
    const Vec s = load_up_to(sin + i, half - i);
    const Vec first = load_up_to(head + i, half - i);
    const Vec second = load_up_to(head + half + i, half - i);
    store_part(out + i, first * c - second * s, half - i);
    store_part(out + half + i, second * c + first * s, half - i);
  }
}

template <class T>
static void heads_typed(const HeadsArgs& a, int64_t row_begin, int64_t row_end) {
  const int64_t dim = a.head_dim;
  const int64_t half = dim / 2;
  const int64_t row = (a.q_heads + 2 * a.kv_heads) * dim;
  T normed[kMaxHeadDim];
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* from = static_cast<const T*>(a.qkv) + r * row;
    const float* cos = a.cos + r * half;
    const float* sin = a.sin + r * half;
    const auto turn = [&](int64_t heads, const void* scale, void* out) {
      T* to = static_cast<T*>(out) + r * heads * dim;
      for (int64_t h = 0; h < heads; ++h, from += dim, to += dim) {
        const T* head = from;
        if (scale) {
          rms_norm_typed(head, static_cast<const T*>(scale), normed, 1, dim, a.eps);
          head = normed;
        }
        rotate_head(head, cos, sin, half, to);
      }
    };
    turn(a.q_heads, a.q_norm, a.q);
    turn(a.kv_heads, a.k_norm, a.k);
    std::memcpy(static_cast<T*>(a.v) + r * a.kv_heads * dim, from, a.kv_heads * dim * sizeof(T));
  }
}

static void heads(const HeadsArgs& a, int64_t row_begin, int64_t row_end) {
  if (a.type == ElementType::kFloat32) {
    heads_typed<float>(a, row_begin, row_end);
  } else {
    heads_typed<uint16_t>(a, row_begin, row_end);
  }
}

}  // namespace ellm::ELLM_ISA
