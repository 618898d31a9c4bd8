// A block of packed K and V, or V where it lies, for the query rows of one KV head: scores, softmax
// and weighted sums, a panel of rows at a time.
#include "kernels/cpu/softmax.inl"

namespace ellm::ELLM_ISA {

// Rows whose scores are held at once: enough that the softmax of one hides behind that of others,
// few enough for the level-1 cache. A multiple of kLanes and of the height of full panels.
constexpr int64_t kRowsAtOnce = 48;

// Of a row of q in int8: what its scores are multiplied with, and what they have too much before.
struct QueryStep {
  float step;
  int32_t bias;
};

struct Workspace {
  float* q;          // [rows, q_stride] words
  float* lane_sums;  // [rows, kLanes], of the part at hand
  float* k;          // a packed block
  float* v;
  float* scores;    // [kRowsAtOnce, kBlock], then weights as words
  float* keep;      // [kRowsAtOnce], what the accumulators are multiplied with
  float* k_scales;  // [kBlock], of the block, where K and V have scales
  float* v_scales;
  QueryStep* q_steps;  // [rows], where words are of int8
  float* p_steps;      // [kRowsAtOnce], of the weights
  SoftmaxState part;
  SoftmaxState total;
  int64_t* position;  // [rows], of its token in the sequence
};

// Words of a row of q; no more than a row of the accumulators has.
template <class Arithmetic>
constexpr int64_t q_stride(int64_t dim) {
  return kInQuads<Arithmetic> ? 2 * words_of<Arithmetic>(dim) : round_up(dim, kLanes);
}

static int64_t attend_scratch_floats(const AttentionArgs& a, int64_t rows) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  // K and V of a block, its scores and scales, steps of the weights; q, both acc and lane_sums,
  // maximum and sum twice, position, steps of q.
  return 2 * kBlock * (stride + 1) + kRowsAtOnce * (kBlock + 2) +
         rows * (3 * stride + kLanes + 4 + 2 + 2);
}

static Workspace carve(const AttentionArgs& a, int64_t rows, float* scratch) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  Workspace w;
  w.k = scratch;
  w.v = w.k + kBlock * stride;
  w.scores = w.v + kBlock * stride;
  w.keep = w.scores + kRowsAtOnce * kBlock;
  w.k_scales = w.keep + kRowsAtOnce;
  w.v_scales = w.k_scales + kBlock;
  w.p_steps = w.v_scales + kBlock;
  w.q = w.p_steps + kRowsAtOnce;
  w.part.acc = w.q + rows * stride;
  w.total.acc = w.part.acc + rows * stride;
  w.lane_sums = w.total.acc + rows * stride;
  w.position = reinterpret_cast<int64_t*>(w.lane_sums + rows * kLanes);
  w.q_steps = reinterpret_cast<QueryStep*>(w.position + rows);
  w.part.max = reinterpret_cast<float*>(w.q_steps + rows);
  w.part.sum = w.part.max + rows;
  w.total.max = w.part.sum + rows;
  w.total.sum = w.total.max + rows;
  return w;
}

// scores[m, j] = factor * q[m] . k[j] for MR rows and the tokens of a packed block; times scales[j]
// where S has them.
template <class Arithmetic, class S, int MR, class Beside>
static inline void score_rows(const float* q, int64_t stride, const float* k, int64_t words,
                              float factor, const float* scales, float* scores,
                              const Beside& beside) {
  constexpr int NR = kPanelVectors;
  for (int64_t j = 0; j < kBlock; j += NR * kLanes) {
    Vec sums[MR][NR] = {};
    multiply_panel<Arithmetic>(q, stride, k + j, kBlock, words, sums, beside);
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) {
        Vec score = sums[m][n] * factor;
        if constexpr (kScaled<S>) score = score * load(scales + j + n * kLanes);
        store(scores + m * kBlock + j + n * kLanes, score);
      }
    }
  }
}

// acc[m] = acc[m] * keep[m] + sum_j p[m, j] * v[j] for MR rows, from element d on.
template <class Arithmetic, int MR, int NR = kPanelVectors>
static inline void weigh_rows(const float* p, const float* keep, const float* v, int64_t stride,
                              int64_t words, int64_t d, float* acc) {
  for (; d + NR * kLanes <= stride; d += NR * kLanes) {
    Vec sums[MR][NR];
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) sums[m][n] = load(acc + m * stride + d + n * kLanes) * keep[m];
    }
    multiply_panel<Arithmetic>(p, kBlock, v + d, stride, words, sums);
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) store(acc + m * stride + d + n * kLanes, sums[m][n]);
    }
  }
  if constexpr (NR > 1) weigh_rows<Arithmetic, MR, NR / 2>(p, keep, v, stride, words, d, acc);
}

// weigh_rows over all tokens of a block, with V where it lies; element d to dim, a multiple of 2
// vectors.
template <class Arithmetic, int MR, class S, int NR = kPanelVectors, class Beside>
static inline void weigh_tokens(const float* p, const float* keep, const S* const* rows,
                                int64_t dim, int64_t d, float* acc, const Beside& beside) {
  const int64_t stride = acc_stride(dim);
  for (; d + NR * kLanes <= dim; d += NR * kLanes) {
    Vec sums[MR][NR];
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) sums[m][n] = load(acc + m * stride + d + n * kLanes) * keep[m];
    }
    for (int64_t i = 0; i < kBlock / Arithmetic::kPerWord; ++i) {
      beside();
      Vec v[NR];
      load_v_words<Arithmetic>(rows, i, d, v);
      for (int m = 0; m < MR; ++m) {
        const Vec weight = Arithmetic::spread(p + m * kBlock + i);
        for (int n = 0; n < NR; ++n) {
          sums[m][n] = Arithmetic::multiply_add(sums[m][n], weight, v[n]);
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) store(acc + m * stride + d + n * kLanes, sums[m][n]);
    }
  }
  if constexpr (NR > 2) {
    weigh_tokens<Arithmetic, MR, S, NR / 2>(p, keep, rows, dim, d, acc, beside);
  }
}

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline Seen seen_by(const AttentionArgs& a, int64_t position, int64_t begin, int64_t low,
                           int64_t high) {
  const int64_t first = a.window > 0 ? position + 1 - a.window : 0;
  return {max_of(low, first - begin), min_of(high, position + 1 - begin)};
}

// Calls step(height, first row) with a constant height for rows [r, end), in panels of nearly the
// same height.
template <int MR = kPanelRows, class Step>
static inline void step_of(int64_t height, int64_t r, const Step& step) {
  if (height == MR) return step(std::integral_constant<int, MR>(), r);
  if constexpr (MR > 1) step_of<MR - 1>(height, r, step);
}

template <int MR = kPanelRows, class Step>
static inline void for_panels(int64_t r, int64_t end, const Step& step) {
  for (int64_t panels = (end - r + MR - 1) / MR; panels > 0; --panels) {
    const int64_t height = (end - r + panels - 1) / panels;
    step_of<MR>(height, r, step);
    r += height;
  }
}

// What products of q and k are multiplied with to be scores as mask_scores takes them.
static inline float score_factor(const AttentionArgs& a) {
  return a.soft_cap > 0.0f ? a.scale / a.soft_cap : a.scale * kLog2E;
}

// w.scores of rows [r, end) with the tokens of the packed K.
template <class Arithmetic, class S, class Beside = Nothing>
static inline void score_panels(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t end,
                                const Beside& beside = {}) {
  const int64_t stride = q_stride<Arithmetic>(a.kv.head_dim);
  const float factor = score_factor(a);
  for_panels(r, end, [&](auto height, int64_t m) {
    score_rows<Arithmetic, S, height>(w.q + m * stride, stride, w.k,
                                      words_of<Arithmetic>(a.kv.head_dim), factor, w.k_scales,
                                      w.scores + (m - r) * kBlock, beside);
  });
}

// Turns w.scores of rows [r, end) into weights, sets w.keep and brings maxima and sums up to date.
// weigh(scores, row, max, sums) turns those of a row, and returns its sums of lanes.
template <class Weigh>
static void soften_scores(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t end,
                          int64_t begin, int64_t low, int64_t high, const Weigh& weigh) {
  const Seen of_first = seen_by(a, w.position[r], begin, low, high);
  const Seen of_last = seen_by(a, w.position[end - 1], begin, low, high);
  const bool whole = of_last.low == 0 && of_first.high == kBlock;
  for (int64_t first = r; first < end; first += kLanes) {
    const int64_t count = min_of(kLanes, end - first);
    alignas(64) float before[kLanes] = {};  // maxima; where a row sees nothing both are 0
    alignas(64) float after[kLanes] = {};
    Vec high_scores[kLanes];
    for (int m = 0; m < kLanes; ++m) high_scores[m] = splat(kMinusInfinity);
    float* scores = w.scores + (first - r) * kBlock;
    for (int64_t m = 0; m < count; ++m) {
      high_scores[m] = whole
                           ? mask_scores<false>(a, scores + m * kBlock, {})
                           : mask_scores<true>(a, scores + m * kBlock,
                                               seen_by(a, w.position[first + m], begin, low, high));
    }
    store(after, largest_each(high_scores));
    for (int64_t m = 0; m < count; ++m) {
      const Seen seen = seen_by(a, w.position[first + m], begin, low, high);
      if (seen.low >= seen.high) {
        after[m] = 0.0f;
        continue;
      }
      float* max = w.part.max + first + m;
      before[m] = *max;
      if (!(after[m] > *max)) after[m] = *max;
      *max = after[m];
    }
    float* keep = w.keep + (first - r);
    store(keep, exp2_negative(load(before) - load(after)));
    for (int64_t m = 0; m < count; ++m) {
      float* sums = w.lane_sums + (first + m) * kLanes;
      store(sums, weigh(scores + m * kBlock, first + m, after[m], load(sums) * keep[m]));
    }
  }
}

// The same with the weights as words, of V as it is held in S.
template <class Arithmetic, class S>
static void soften_scores(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t end,
                          int64_t begin, int64_t low, int64_t high) {
  soften_scores(a, w, r, end, begin, low, high,
                [&](float* scores, int64_t row, float max, Vec sums) {
                  if constexpr (kScaled<S>) {
                    const Seen seen = seen_by(a, w.position[row], begin, low, high);
                    return weigh_scaled_scores(scores, max, w.v_scales, seen, sums);
                  } else {
                    return weigh_scores<Arithmetic>(scores, max, sums);
                  }
                });
}

// Calls step(first row, end) for rows [r, rows_end), kRowsAtOnce at most at a time, where any of
// them sees a token of [low, high) of the block that begins at token `begin`.
template <class Step>
static void for_seeing_rows(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t rows_end,
                            int64_t begin, int64_t low, int64_t high, const Step& step) {
  for (; r < rows_end; r += kRowsAtOnce) {
    const int64_t end = min_of(rows_end, r + kRowsAtOnce);
    const Seen of_first = seen_by(a, w.position[r], begin, low, high);
    const Seen of_last = seen_by(a, w.position[end - 1], begin, low, high);
    if (of_first.low < of_last.high) step(r, end);
  }
}

// Adds tokens [low, high) of the packed block that begins at token `begin` to the states of rows
// [r, end); each takes those that it sees.
template <class Arithmetic, class S>
static void attend_rows(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t rows_end,
                        int64_t begin, int64_t low, int64_t high) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  for_seeing_rows(a, w, r, rows_end, begin, low, high, [&](int64_t first, int64_t end) {
    score_panels<Arithmetic, S>(a, w, first, end);
    soften_scores<Arithmetic, S>(a, w, first, end, begin, low, high);
    for_panels(first, end, [&](auto height, int64_t m) {
      weigh_rows<Arithmetic, height>(w.scores + (m - first) * kBlock, w.keep + (m - first), w.v,
                                     stride, words_of<Arithmetic>(high), 0,
                                     w.part.acc + m * stride);
    });
  });
}

}  // namespace ellm::ELLM_ISA
