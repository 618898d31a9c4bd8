// A block of packed K and V, or V where it lies, for the query rows of one KV head: scores, softmax
// and weighted sums, a panel of rows at a time.
#include "kernels/cpu/softmax.inl"

namespace ellm::ELLM_ISA {

// Rows whose scores are held at once: enough that the softmax of one hides behind that of others,
// few enough for the level-1 cache. A multiple of kLanes and of the height of full panels.
constexpr int64_t kRowsAtOnce = 48;

struct Workspace {
  float* q;          // [rows, stride] words
  float* lane_sums;  // [rows, kLanes], of the part at hand
  float* k;          // a packed block
  float* v;
  float* scores;  // [kRowsAtOnce, kBlock], then weights as words
  float* keep;    // [kRowsAtOnce], what the accumulators are multiplied with
  SoftmaxState part;
  SoftmaxState total;
  int64_t* position;  // [rows], of its token in the sequence
};

static int64_t attend_scratch_floats(const AttentionArgs& a, int64_t rows) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  // K and V of a block, its scores; q, both acc and lane_sums, maximum and sum twice, position.
  return 2 * kBlock * stride + kRowsAtOnce * (kBlock + 1) + rows * (3 * stride + kLanes + 4 + 2);
}

static Workspace carve(const AttentionArgs& a, int64_t rows, float* scratch) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  Workspace w;
  w.k = scratch;
  w.v = w.k + kBlock * stride;
  w.scores = w.v + kBlock * stride;
  w.keep = w.scores + kRowsAtOnce * kBlock;
  w.q = w.keep + kRowsAtOnce;
  w.part.acc = w.q + rows * stride;
  w.total.acc = w.part.acc + rows * stride;
  w.lane_sums = w.total.acc + rows * stride;
  w.position = reinterpret_cast<int64_t*>(w.lane_sums + rows * kLanes);
  w.part.max = reinterpret_cast<float*>(w.position + rows);
  w.part.sum = w.part.max + rows;
  w.total.max = w.part.sum + rows;
  w.total.sum = w.total.max + rows;
  return w;
}

// scores[m, j] = factor * q[m] . k[j] for MR rows and the tokens of a packed block.
template <class Arithmetic, int MR, class Beside>
static inline void score_rows(const float* q, int64_t stride, const float* k, int64_t words,
                              float factor, float* scores, const Beside& beside) {
  constexpr int NR = kPanelVectors;
  for (int64_t j = 0; j < kBlock; j += NR * kLanes) {
    Vec sums[MR][NR] = {};
    multiply_panel<Arithmetic>(q, stride, k + j, kBlock, words, sums, beside);
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) {
        store(scores + m * kBlock + j + n * kLanes, sums[m][n] * factor);
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
template <class Arithmetic, int MR, class T, int NR = kPanelVectors, class Beside>
static inline void weigh_tokens(const float* p, const float* keep, const T* const* rows,
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
    weigh_tokens<Arithmetic, MR, T, NR / 2>(p, keep, rows, dim, d, acc, beside);
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

template <class Step>
static inline void for_panels(int64_t r, int64_t end, const Step& step) {
  for (int64_t panels = (end - r + kPanelRows - 1) / kPanelRows; panels > 0; --panels) {
    const int64_t height = (end - r + panels - 1) / panels;
    step_of(height, r, step);
    r += height;
  }
}

// w.scores of rows [r, end) with the tokens of the packed K.
template <class Arithmetic, class Beside = Nothing>
static inline void score_panels(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t end,
                                const Beside& beside = {}) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  const float factor = a.soft_cap > 0.0f ? a.scale / a.soft_cap : a.scale * kLog2E;
  for_panels(r, end, [&](auto height, int64_t m) {
    score_rows<Arithmetic, height>(w.q + m * stride, stride, w.k,
                                   words_of<Arithmetic>(a.kv.head_dim), factor,
                                   w.scores + (m - r) * kBlock, beside);
  });
}

// Turns w.scores of rows [r, end) into weights, sets w.keep and brings maxima and sums up to date.
template <class Arithmetic>
static void soften_scores(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t end,
                          int64_t begin, int64_t low, int64_t high) {
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
      store(sums, weigh_scores<Arithmetic>(scores + m * kBlock, after[m], load(sums) * keep[m]));
    }
  }
}

// Adds tokens [low, high) of the packed block that begins at token `begin` to the states of rows
// [r, end); each takes those that it sees.
template <class Arithmetic>
static void attend_rows(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t rows_end,
                        int64_t begin, int64_t low, int64_t high) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  for (; r < rows_end; r += kRowsAtOnce) {
    const int64_t end = min_of(rows_end, r + kRowsAtOnce);
    const Seen of_first = seen_by(a, w.position[r], begin, low, high);
    const Seen of_last = seen_by(a, w.position[end - 1], begin, low, high);
    if (of_first.low >= of_last.high) continue;  // no row sees any
    score_panels<Arithmetic>(a, w, r, end);
    soften_scores<Arithmetic>(a, w, r, end, begin, low, high);
    for_panels(r, end, [&](auto height, int64_t m) {
      weigh_rows<Arithmetic, height>(w.scores + (m - r) * kBlock, w.keep + (m - r), w.v, stride,
                                     words_of<Arithmetic>(high), 0, w.part.acc + m * stride);
    });
  }
}

}  // namespace ellm::ELLM_ISA
