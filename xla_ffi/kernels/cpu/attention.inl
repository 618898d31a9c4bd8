// Attention of a block of query rows over the tokens of their KV heads, by online softmax.
//
// The order in which a row is reduced follows from its position alone: scores are summed along
// head_dim word by word, taken in blocks of kBlock tokens counted from the part's first token,
// weighed with V token by token; parts of part_tokens tokens are merged first to last. A row of a
// long prompt and the same row decoded alone are equal to the bit.
#include "kernels/cpu/quads.inl"

namespace ellm::ELLM_ISA {

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
  for_rows(a, u, [&](int64_t r, int64_t token, int64_t element) {
    const T* from = static_cast<const T*>(a.q) + element;
    float* to = w.q + r * q_stride<Arithmetic>(dim);
    w.position[r] = u.span.context_tokens + token;
    if constexpr (kInQuads<Arithmetic>) {
      w.q_steps[r] = quantize_query(from, dim, to);
      return;
    }
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

// attend_block of all tokens of a block for `rows` rows, kPanelRows at most, that see them all.
// Reading K and V takes as long as all that is done with them, so both go on side by side.
template <class Arithmetic, class S>
static void attend_few(const AttentionArgs& a, const Workspace& w, int64_t rows,
                       const BlockRows<S>& block, const BlockRows<S>& next, int64_t begin) {
  const int64_t dim = a.kv.head_dim;
  Ahead<S> ahead(next);
  const int64_t lines = ahead.lines();
  // The parts of the work take about 3, 2 and 3 eighths of the time.
  pack_k<Arithmetic>(block.k, &ahead, lines * 3 / 8, dim, w.k);
  const int64_t words = words_of<Arithmetic>(dim) * (kBlock / kLanes / kPanelVectors);
  const int64_t lines_each = divide_up(lines / 4, words);
  score_panels<Arithmetic, S>(a, w, 0, rows, [&] { ahead.ask(lines_each); });
  soften_scores<Arithmetic, S>(a, w, 0, rows, begin, 0, kBlock);
  const int64_t steps = divide_up(dim, kPanelVectors * kLanes) * words_of<Arithmetic>(kBlock);
  const int64_t lines_of_step = divide_up(lines * 3 / 8, steps);
  step_of(rows, 0, [&](auto height, int64_t) {
    weigh_tokens<Arithmetic, height>(w.scores, w.keep, block.v, dim, 0, w.part.acc,
                                     [&] { ahead.ask(lines_of_step); });
  });
}

// Adds tokens [low, high) of the block that begins at token `begin` to the states of the rows of a
// KV head, and asks for the block `next`.
template <class Arithmetic, class S>
static void attend_block(const AttentionArgs& a, const AttentionUnit& u, const Workspace& w,
                         int64_t head, const BlockRows<S>& block, const BlockRows<S>& next,
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
  Ahead<S> ahead(next);
  const int64_t lines = ahead.lines() / 2;
  pack_k<Arithmetic>(block.k, &ahead, lines, dim, w.k);
  pack_v<Arithmetic>(block.v, &ahead, lines, dim, stride, w.v);
  const Seen of_first = seen_by(a, w.position[0], begin, low, high);
  const Seen of_last = seen_by(a, w.position[rows - 1], begin, low, high);
  const bool all_see_all = of_last.low <= low && of_first.high >= high;
  // Where V has scales it is finite: what may not be are scales, of which each row takes its own.
  if (all_see_all || kScaled<S> || all_finite(block.v, dim)) {
    return attend_rows<Arithmetic, S>(a, w, 0, rows, begin, low, high);
  }
  // A weight of 0 does not silence a V that is not finite: each token gets a V of its own, with
  // zeros for what it does not see.
  for (int64_t r = 0; r < rows; r += group) {
    const Seen seen = seen_by(a, w.position[r], begin, low, high);
    if (seen.low >= seen.high) continue;
    BlockRows<S> own;
    find_rows(a, u.span.slot, head, begin, seen.low, seen.high, &own);
    pack_v<Arithmetic>(own.v, &ahead, 0, dim, stride, w.v);
    attend_rows<Arithmetic, S>(a, w, r, r + group, begin, seen.low, seen.high);
  }
}

// The workspace as the rows of the unit's KV head `index` see it.
template <class Arithmetic>
static Workspace of_head(Workspace w, int64_t index, int64_t rows, int64_t dim) {
  const int64_t stride = acc_stride(dim);
  w.q += index * rows * q_stride<Arithmetic>(dim);
  w.lane_sums += index * rows * kLanes;
  w.q_steps += index * rows;
  w.part.max += index * rows;
  w.part.sum += index * rows;
  w.part.acc += index * rows * stride;
  return w;
}

// Adds the tokens [from, to) of the part that begins at part_begin to the state w.part. Tokens up
// to `end` are read next. All heads take a block before any takes the next one: their tiles are
// neighbours in memory.
template <class Arithmetic, class S>
static void attend_part(const AttentionArgs& a, const AttentionUnit& u, int64_t part_begin,
                        int64_t from, int64_t to, int64_t end, const Workspace& w) {
  const int64_t rows = rows_of_head(a, u);
  BlockRows<S> blocks[2];
  int64_t begin = from - (from - part_begin) % kBlock;
  const auto find = [&](int64_t head, int64_t at, int64_t stop, BlockRows<S>* rows) {
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
      const BlockRows<S>& block = blocks[i];
      if constexpr (kScaled<S>) {
        load_scales(block, BlockRows<S>::kKeyScales, w.k_scales);
        load_scales(block, BlockRows<S>::kValueScales, w.v_scales);
      }
      const Workspace own = of_head<Arithmetic>(w, h - u.head_begin, rows, a.kv.head_dim);
      const int64_t low = max_of(0, from - begin);
      const int64_t high = min_of(kBlock, to - begin);
      if constexpr (kInQuads<Arithmetic>) {
        attend_quads(a, own, rows, block, blocks[i ^ 1], begin, low, high);
      } else {
        attend_block<Arithmetic>(a, u, own, h, block, blocks[i ^ 1], begin, low, high);
      }
    }
  }
}

// q and the result are of type T, K and V as they are held of type S.
template <class T, class S>
static void attend_typed(const AttentionArgs& a, const AttentionUnit& u, float* scratch,
                         const SoftmaxState* partial) {
  using Arithmetic = ArithmeticFor<T, S>;
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
    if (from < to) attend_part<Arithmetic, S>(a, u, part_begin, from, to, end, w);
    for (int64_t r = 0; r < rows; ++r) w.part.sum[r] = sum(load(w.lane_sums + r * kLanes));
    if (!partial) merge_into(w.total, w.part, rows, stride);
  }
  if (!partial) write_rows<T>(a, u, w.total);
}

static void attend(const AttentionArgs& a, const AttentionUnit& u, float* scratch,
                   const SoftmaxState* partial) {
  const bool scaled = a.kv.scale_bytes != 0;
  if (a.type == ElementType::kFloat32) {
    (scaled ? attend_typed<float, int8_t> : attend_typed<float, float>)(a, u, scratch, partial);
  } else {
    (scaled ? attend_typed<uint16_t, int8_t> : attend_typed<uint16_t, uint16_t>)(a, u, scratch,
                                                                                 partial);
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
