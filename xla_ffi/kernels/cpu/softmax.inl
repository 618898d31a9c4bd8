// The online softmax of query rows, in base 2: maxima and scores are logarithms to the base 2.
#include "kernels/cpu/pack.inl"

namespace ellm::ELLM_ISA {

constexpr float kMinusInfinity = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;

// Tokens of a block that a row sees, relative to the block; none where low >= high.
struct Seen {
  int64_t low;
  int64_t high;
};

// Floats between rows of SoftmaxState::acc.
static int64_t acc_stride(int64_t head_dim) { return round_up(head_dim, kLanes); }

static void reset(const SoftmaxState& s, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    s.max[r] = kMinusInfinity;
    s.sum[r] = 0.0f;
  }
  std::memset(s.acc, 0, rows * stride * sizeof(float));
}

static inline float exp2_one(float x) { return exp2_negative(splat(x))[0]; }

// total = total merged with `part`, whose tokens come after. One copy of the code for the divided
// and the undivided path: inlined twice, a*b + c*d may be contracted in two ways.
[[gnu::noinline]] static void merge_into(const SoftmaxState& total, const SoftmaxState& part,
                                         int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    // The row sees no token of this part. A part of NaN scores has no maximum either, but a sum.
    if (part.sum[r] == 0.0f) continue;
    const float max = total.max[r] > part.max[r] ? total.max[r] : part.max[r];
    const float keep = exp2_one(total.max[r] - max);
    const float add = exp2_one(part.max[r] - max);
    total.max[r] = max;
    total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
    float* to = total.acc + r * stride;
    const float* from = part.acc + r * stride;
    for (int64_t d = 0; d < stride; d += kLanes) {
      store(to + d, load(to + d) * keep + load(from + d) * add);
    }
  }
}

// All ones in the lanes of those of the tokens from j on that are seen.
static inline IVec sees(Seen seen, int64_t j) {
  const IVec token = lane_ids() + static_cast<int32_t>(j);
  return (token >= static_cast<int32_t>(seen.low)) & (token < static_cast<int32_t>(seen.high));
}

// Caps and masks the raw scores of a block in place. Returns the largest that are seen, by lane.
template <bool Masked>
static inline Vec mask_scores(const AttentionArgs& a, float* scores, Seen seen) {
  Vec high_score = splat(kMinusInfinity);
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    Vec s = load(scores + j);
    if (a.soft_cap > 0.0f) s = a.soft_cap * kLog2E * tanh(s);
    if (Masked) s = select(sees(seen, j), s, splat(kMinusInfinity));
    if (Masked || a.soft_cap > 0.0f) store(scores + j, s);
    high_score = vmax(s, high_score);
  }
  return high_score;
}

// Turns the scores of a block into weights 2^(score - max), in place, as words. Returns the sums of
// the lanes: `sums` and, on top, the weights as they are multiplied with V, rounding included.
template <class Arithmetic>
static inline Vec weigh_scores(float* scores, float max, Vec sums) {
  if constexpr (Arithmetic::kPerWord == 1) {
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      const Vec p = exp2_negative(load(scores + j) - max);
      store(scores + j, p);
      sums += p;
    }
  } else {
#if defined(__AVX512BF16__)
    const Vec ones = reinterpret_cast<Vec>(_mm512_set1_epi16(0x3f80));
    constexpr Accuracy kRounded = Accuracy::kBFloat16;
    for (int64_t j = 0; j < kBlock; j += 2 * kLanes) {
      const Vec p = exp2_negative<kRounded>(load(scores + j) - max);
      const Vec next = exp2_negative<kRounded>(load(scores + j + kLanes) - max);
      const Vec words = reinterpret_cast<Vec>(_mm512_cvtne2ps_pbh(next, p));
      store(scores + j / 2, words);
      sums = Arithmetic::multiply_add(sums, words, ones);
    }
#endif
  }
  return sums;
}

// The scales of the tokens from j on that are seen, zeros for the others. That of a row that is not
// finite is NaN, which only those who see it may take.
static inline Vec seen_scales(const float* scales, Seen seen, int64_t j) {
  return select(sees(seen, j), load(scales + j), Vec{});
}

// weigh_scores where V has scales: a weight takes that of its token with it, but the sums are of
// weights alone. One copy of the code for all callers, so that nothing is contracted in two ways.
[[gnu::noinline]] static Vec weigh_scaled_scores(float* scores, float max, const float* scales,
                                                 Seen seen, Vec sums) {
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Vec p = exp2_negative(load(scores + j) - max);
    store(scores + j, p * seen_scales(scales, seen, j));
    sums += p;
  }
  return sums;
}

}  // namespace ellm::ELLM_ISA
