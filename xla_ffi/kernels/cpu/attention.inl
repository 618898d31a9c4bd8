// Attention of a block of query rows over the tokens of their KV heads, by online softmax.
//
// The order in which a row is reduced follows from its position alone: scores are summed along
// head_dim word by word, taken in blocks of kBlock tokens counted from the part's first token,
// weighed with V token by token; parts of part_tokens tokens are merged first to last. A row of a
// long prompt and the same row decoded alone are equal to the bit.
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

static int64_t rows_of_head(const AttentionArgs& a, const AttentionUnit& u) {
  return (u.token_end - u.token_begin) * (a.q_heads / a.kv.kv_heads);
}

static int64_t rows_of(const AttentionArgs& a, const AttentionUnit& u) {
  return (u.head_end - u.head_begin) * rows_of_head(a, u);
}

// Calls step(r, token, element) for every row of the unit: its number, its token relative to the
// span, and where it begins in q and out.
template <class Step>
static inline void for_rows(const AttentionArgs& a, const AttentionUnit& u, const Step& step) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  int64_t r = 0;
  for (int64_t h = u.head_begin; h < u.head_end; ++h) {
    for (int64_t t = u.token_begin; t < u.token_end; ++t) {
      const int64_t first = (u.span.row_begin + t) * a.q_heads + h * group;
      for (int64_t g = 0; g < group; ++g, ++r) step(r, t, (first + g) * a.kv.head_dim);
    }
  }
}

template <class Arithmetic, class T>
static void load_queries(const AttentionArgs& a, const AttentionUnit& u, const Workspace& w) {
  const int64_t dim = a.kv.head_dim;
  const int64_t stride = acc_stride(dim);
  for_rows(a, u, [&](int64_t r, int64_t token, int64_t element) {
    const T* from = static_cast<const T*>(a.q) + element;
    w.position[r] = u.span.context_tokens + token;
    float* to = w.q + r * stride;
    for (int64_t d = 0; d < dim; d += kLanes * Arithmetic::kPerWord, to += kLanes) {
      store(to, load_words<Arithmetic>(from, d, dim));
    }
  });
}

template <class T>
static void write_rows(const AttentionArgs& a, const AttentionUnit& u, const SoftmaxState& s) {
  const int64_t dim = a.kv.head_dim;
  const int64_t stride = acc_stride(dim);
  for_rows(a, u, [&](int64_t r, int64_t, int64_t element) {
    T* to = static_cast<T*>(a.out) + element;
    const float inverse = 1.0f / s.sum[r];
    for (int64_t d = 0; d < dim; d += kLanes) {
      store_part(to + d, load(s.acc + r * stride + d) * inverse, dim - d);
    }
  });
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

// attend_block of all tokens of a block for `rows` rows, kPanelRows at most, that see them all.
// Reading K and V takes as long as all that is done with them, so both go on side by side.
template <class Arithmetic, class T>
static void attend_few(const AttentionArgs& a, const Workspace& w, int64_t rows,
                       const BlockRows<T>& block, const BlockRows<T>& next, int64_t begin) {
  const int64_t dim = a.kv.head_dim;
  Ahead<T> ahead(next);
  const int64_t lines = ahead.lines();
  // The parts of the work take about 3, 2 and 3 eighths of the time.
  pack_k<Arithmetic>(block.k, &ahead, lines * 3 / 8, dim, w.k);
  const int64_t words = words_of<Arithmetic>(dim) * (kBlock / kLanes / kPanelVectors);
  const int64_t lines_each = divide_up(lines / 4, words);
  score_panels<Arithmetic>(a, w, 0, rows, [&] { ahead.ask(lines_each); });
  soften_scores<Arithmetic>(a, w, 0, rows, begin, 0, kBlock);
  const int64_t steps = divide_up(dim, kPanelVectors * kLanes) * words_of<Arithmetic>(kBlock);
  const int64_t lines_of_step = divide_up(lines * 3 / 8, steps);
  step_of(rows, 0, [&](auto height, int64_t) {
    weigh_tokens<Arithmetic, height>(w.scores, w.keep, block.v, dim, 0, w.part.acc,
                                     [&] { ahead.ask(lines_of_step); });
  });
}

// Adds tokens [low, high) of the block that begins at token `begin` to the states of the rows of a
// KV head, and asks for the block `next`.
template <class Arithmetic, class T>
static void attend_block(const AttentionArgs& a, const AttentionUnit& u, const Workspace& w,
                         int64_t head, const BlockRows<T>& block, const BlockRows<T>& next,
                         int64_t begin, int64_t low, int64_t high) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  const int64_t rows = rows_of_head(a, u);
  const int64_t dim = a.kv.head_dim;
  const int64_t stride = acc_stride(dim);
  // Of one token, so that each row sees [low, high).
  const bool few = rows == group && rows <= kPanelRows && dim % (2 * kLanes) == 0;
  if (few && low == 0 && high == kBlock) {
    return attend_few<Arithmetic>(a, w, rows, block, next, begin);
  }
  Ahead<T> ahead(next);
  const int64_t lines = ahead.lines() / 2;
  pack_k<Arithmetic>(block.k, &ahead, lines, dim, w.k);
  pack_v<Arithmetic>(block.v, &ahead, lines, dim, stride, w.v);
  const Seen of_first = seen_by(a, w.position[0], begin, low, high);
  const Seen of_last = seen_by(a, w.position[rows - 1], begin, low, high);
  const bool all_see_all = of_last.low <= low && of_first.high >= high;
  if (all_see_all || all_finite(block.v, dim)) {
    return attend_rows<Arithmetic>(a, w, 0, rows, begin, low, high);
  }
  // A weight of 0 does not silence a V that is not finite: each token gets a V of its own, with
  // zeros for what it does not see.
  for (int64_t r = 0; r < rows; r += group) {
    const Seen seen = seen_by(a, w.position[r], begin, low, high);
    if (seen.low >= seen.high) continue;
    BlockRows<T> own;
    find_rows(a, u.span.slot, head, begin, seen.low, seen.high, &own);
    pack_v<Arithmetic>(own.v, &ahead, 0, dim, stride, w.v);
    attend_rows<Arithmetic>(a, w, r, r + group, begin, seen.low, seen.high);
  }
}

// The workspace as the rows of the unit's KV head `index` see it.
static Workspace of_head(Workspace w, int64_t index, int64_t rows, int64_t stride) {
  w.q += index * rows * stride;
  w.lane_sums += index * rows * kLanes;
  w.part.max += index * rows;
  w.part.sum += index * rows;
  w.part.acc += index * rows * stride;
  return w;
}

// Adds the tokens [from, to) of the part that begins at part_begin to the state w.part. Tokens up
// to `end` are read next. All heads take a block before any takes the next one: their tiles are
// neighbours in memory.
template <class Arithmetic, class T>
static void attend_part(const AttentionArgs& a, const AttentionUnit& u, int64_t part_begin,
                        int64_t from, int64_t to, int64_t end, const Workspace& w) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  BlockRows<T> blocks[2];
  int64_t begin = from - (from - part_begin) % kBlock;
  const auto find = [&](int64_t head, int64_t at, int64_t stop, BlockRows<T>* rows) {
    find_rows(a, u.span.slot, head, at, max_of(0, from - at), min_of(kBlock, stop - at), rows);
  };
  find(u.head_begin, begin, to, &blocks[0]);
  for (int i = 0; begin < to; begin += kBlock) {
    for (int64_t h = u.head_begin; h < u.head_end; ++h, i ^= 1) {
      const int64_t next = begin + kBlock;
      if (h + 1 < u.head_end) {
        find(h + 1, begin, to, &blocks[i ^ 1]);
      } else {
        find(u.head_begin, next, next < to ? to : end, &blocks[i ^ 1]);
      }
      attend_block<Arithmetic>(a, u, of_head(w, h - u.head_begin, rows_of_head(a, u), stride), h,
                               blocks[i], blocks[i ^ 1], begin, max_of(0, from - begin),
                               min_of(kBlock, to - begin));
    }
  }
}

template <class T>
static void attend_typed(const AttentionArgs& a, const AttentionUnit& u, float* scratch,
                         const SoftmaxState* partial) {
  using Arithmetic = ArithmeticFor<T>;
  const int64_t stride = acc_stride(a.kv.head_dim);
  const int64_t rows = rows_of(a, u);
  Workspace w = carve(a, rows, scratch);
  load_queries<Arithmetic, T>(a, u, w);
  if (!partial) reset(w.total, rows, stride);

  const int64_t first_position = u.span.context_tokens + u.token_begin;
  const int64_t last_position = u.span.context_tokens + u.token_end - 1;
  const int64_t first_seen = a.window > 0 ? max_of(0, first_position + 1 - a.window) : 0;
  const int64_t end = min_of(u.part_end * a.part_tokens, last_position + 1);
  for (int64_t part = u.part_begin; part < u.part_end; ++part) {
    if (partial) w.part = partial[part - u.part_begin];
    reset(w.part, rows, stride);
    std::memset(w.lane_sums, 0, rows * kLanes * sizeof(float));
    const int64_t part_begin = part * a.part_tokens;
    const int64_t from = max_of(part_begin, first_seen);
    const int64_t to = min_of(part_begin + a.part_tokens, last_position + 1);
    if (from < to) attend_part<Arithmetic, T>(a, u, part_begin, from, to, end, w);
    for (int64_t r = 0; r < rows; ++r) w.part.sum[r] = sum(load(w.lane_sums + r * kLanes));
    if (!partial) merge_into(w.total, w.part, rows, stride);
  }
  if (!partial) write_rows<T>(a, u, w.total);
}

static void attend(const AttentionArgs& a, const AttentionUnit& u, float* scratch,
                   const SoftmaxState* partial) {
  if (a.type == ElementType::kFloat32) {
    attend_typed<float>(a, u, scratch, partial);
  } else {
    attend_typed<uint16_t>(a, u, scratch, partial);
  }
}

static void merge(const AttentionArgs& a, const AttentionUnit& u, const SoftmaxState* partial,
                  float* scratch) {
  const int64_t rows = rows_of(a, u);
  const int64_t stride = acc_stride(a.kv.head_dim);
  const Workspace w = carve(a, rows, scratch);
  reset(w.total, rows, stride);
  for (int64_t part = 0; part < u.part_end - u.part_begin; ++part) {
    merge_into(w.total, partial[part], rows, stride);
  }
  if (a.type == ElementType::kFloat32) {
    write_rows<float>(a, u, w.total);
  } else {
    write_rows<uint16_t>(a, u, w.total);
  }
}

}  // namespace ellm::ELLM_ISA
