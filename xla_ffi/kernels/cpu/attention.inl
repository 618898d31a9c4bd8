// Attention of a block of query rows over the tiles of one KV head, by online softmax.
//
// The order in which a row is reduced follows from its position alone: dot products run along
// head_dim in lanes and a fixed tree, scores are taken in blocks of kBlock tokens counted from
// the tile's first token, parts of part_tokens tokens are merged first to last. A row of a long
// prompt and the same row decoded alone are equal to the bit.
#include "kernels/cpu/rows.inl"

namespace ellm::ELLM_ISA {

// Tokens whose scores are held at once; a tile is one or more blocks.
constexpr int64_t kBlock = 64;
constexpr float kMinusInfinity = -__builtin_inff();
// Up to this many rows bfloat16 K and V are widened as they are read; for more, once beforehand.
constexpr int64_t kRowsInPlace = 8;

static int64_t acc_stride(int64_t head_dim) { return round_up(head_dim, kLanes); }

static int64_t attend_scratch_floats(const AttentionArgs& a, int64_t rows) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  // q, acc and total of every row; maximum and sum twice; what it sees; scores; K and V of a block.
  return rows * (3 * stride + 4 + 2 + kBlock) + 2 * kBlock * stride;
}

// Tokens of a block that a row sees, relative to the block; none where low >= high.
struct Seen {
  int32_t low;
  int32_t high;
};

struct Workspace {
  float* q;       // [rows, stride], scaled
  float* scores;  // [rows, kBlock]
  float* k;       // [kBlock, stride]
  float* v;       // [kBlock, stride]
  SoftmaxState part;
  SoftmaxState total;
  Seen* seen;  // [rows], of the block at hand
};

static Workspace carve(const AttentionArgs& a, int64_t rows, float* scratch) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  Workspace w;
  w.q = scratch;
  w.part.acc = w.q + rows * stride;
  w.total.acc = w.part.acc + rows * stride;
  w.k = w.total.acc + rows * stride;
  w.v = w.k + kBlock * stride;
  w.scores = w.v + kBlock * stride;
  w.part.max = w.scores + rows * kBlock;
  w.part.sum = w.part.max + rows;
  w.total.max = w.part.sum + rows;
  w.total.sum = w.total.max + rows;
  w.seen = reinterpret_cast<Seen*>(w.total.sum + rows);
  return w;
}

static void reset(const SoftmaxState& s, int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    s.max[r] = kMinusInfinity;
    s.sum[r] = 0.0f;
  }
  std::memset(s.acc, 0, rows * stride * sizeof(float));
}

static inline float exp_one(float x) { return exp(splat(x))[0]; }

// total = total merged with `part`, whose tokens come after. One copy of the code for the divided
// and the undivided path: inlined twice, a*b + c*d may be contracted in two ways.
[[gnu::noinline]] static void merge_into(const SoftmaxState& total, const SoftmaxState& part,
                                         int64_t rows, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    // The row sees no token of this part. A part of NaN scores has no maximum either, but a sum.
    if (part.sum[r] == 0.0f) continue;
    const float max = total.max[r] > part.max[r] ? total.max[r] : part.max[r];
    const float keep = exp_one(total.max[r] - max);
    const float add = exp_one(part.max[r] - max);
    total.max[r] = max;
    total.sum[r] = total.sum[r] * keep + part.sum[r] * add;
    float* to = total.acc + r * stride;
    const float* from = part.acc + r * stride;
    for (int64_t d = 0; d < stride; d += kLanes) {
      store(to + d, load(to + d) * keep + load(from + d) * add);
    }
  }
}

// scores[r, j] = q[r] . k[j] for MR rows and `tokens` tokens, a multiple of kLanes.
template <int MR, class T>
static inline void score_rows(const float* q, const T* k, int64_t stride, int64_t tokens,
                              float* scores) {
  constexpr int NR = kLanes / MR;
  for (int64_t j = 0; j < tokens; j += NR) {
    Vec acc[kLanes] = {};
    for (int64_t d = 0; d < stride; d += kLanes) {
      Vec qv[MR];
      for (int m = 0; m < MR; ++m) qv[m] = load(q + m * stride + d);
      for (int n = 0; n < NR; ++n) {
        const Vec kv = load(k + (j + n) * stride + d);
        for (int m = 0; m < MR; ++m) acc[m * NR + n] += qv[m] * kv;
      }
    }
    float sums[kLanes];
    store(sums, sum_each(acc));
    for (int m = 0; m < MR; ++m) std::memcpy(scores + m * kBlock + j, sums + m * NR, NR * 4);
  }
}

// acc[r] += sum_j p[r, j] * v[j] for MR rows and j in [begin, end), ascending.
template <int MR, class T>
static inline void weigh_rows(const float* p, const T* v, int64_t v_stride, int64_t begin,
                              int64_t end, float* acc, int64_t acc_row) {
  constexpr int NV = kLanes == 16 || MR == 1 ? 4 : 2;  // accumulators that fit the register file
  for (int64_t d = 0; d < acc_row; d += NV * kLanes) {
    const int64_t vectors = min_of(NV, (acc_row - d) / kLanes);
    if (vectors == NV) {
      Vec sum[MR][NV];
      for (int m = 0; m < MR; ++m)
        for (int i = 0; i < NV; ++i) sum[m][i] = load(acc + m * acc_row + d + i * kLanes);
      for (int64_t j = begin; j < end; ++j) {
        Vec vv[NV];
        for (int i = 0; i < NV; ++i) vv[i] = load(v + j * v_stride + d + i * kLanes);
        for (int m = 0; m < MR; ++m) {
          const Vec weight = splat(p[m * kBlock + j]);
          for (int i = 0; i < NV; ++i) sum[m][i] += weight * vv[i];
        }
      }
      for (int m = 0; m < MR; ++m)
        for (int i = 0; i < NV; ++i) store(acc + m * acc_row + d + i * kLanes, sum[m][i]);
      continue;
    }
    for (int64_t i = d; i < d + vectors * kLanes; i += kLanes) {
      for (int m = 0; m < MR; ++m) {
        Vec sum = load(acc + m * acc_row + i);
        for (int64_t j = begin; j < end; ++j) {
          sum += splat(p[m * kBlock + j]) * load(v + j * v_stride + i);
        }
        store(acc + m * acc_row + i, sum);
      }
    }
  }
}

// weigh_rows for MR rows that each see their own tokens and read no others: 0 * v would be NaN
// where v is not finite.
template <int MR, class T>
static inline void weigh_seen(const Seen* seen, const float* p, const T* v, float* acc,
                              int64_t stride) {
  int64_t low = seen[0].low;  // what all rows see; the rest, left and right of it, row by row
  int64_t high = seen[0].high;
  for (int m = 1; m < MR; ++m) {
    low = max_of(low, seen[m].low);
    high = min_of(high, seen[m].high);
  }
  high = max_of(low, high);
  for (int m = 0; m < MR; ++m) {
    const int64_t end = min_of(low, seen[m].high);
    if (seen[m].low < end) {
      weigh_rows<1>(p + m * kBlock, v, stride, seen[m].low, end, acc + m * stride, stride);
    }
  }
  if (low < high) weigh_rows<MR>(p, v, stride, low, high, acc, stride);
  for (int m = 0; m < MR; ++m) {
    const int64_t begin = max_of(high, seen[m].low);
    if (begin < seen[m].high) {
      weigh_rows<1>(p + m * kBlock, v, stride, begin, seen[m].high, acc + m * stride, stride);
    }
  }
}

// Turns a row's raw scores into weights: tokens it does not see weigh exactly nothing, whatever
// their memory holds.
static inline void softmax_row(const AttentionArgs& a, float* scores, int64_t tokens, Seen row,
                               float* max, float* sum, float* acc, int64_t stride) {
  if (row.low >= row.high) return;
  const IVec lanes = lane_ids();
  const Vec minus_infinity = splat(kMinusInfinity);
  Vec high_score = minus_infinity;
  for (int64_t j = 0; j < tokens; j += kLanes) {
    Vec s = load(scores + j);
    if (a.soft_cap > 0.0f) s = a.soft_cap * tanh(s / a.soft_cap);
    const IVec token = lanes + static_cast<int32_t>(j);
    const IVec seen = (token >= row.low) & (token < row.high);
    s = select(seen, s, minus_infinity);
    store(scores + j, s);
    high_score = vmax(s, high_score);
  }
  const float block_max = largest(high_score);
  const float new_max = block_max > *max ? block_max : *max;
  Vec weights = {};
  for (int64_t j = 0; j < tokens; j += kLanes) {
    const Vec p = exp(load(scores + j) - new_max);
    store(scores + j, p);
    weights += p;
  }
  float keep = 1.0f;  // what exp gives for 0: leaving the accumulators alone is the same
  if (new_max != *max) {
    keep = exp_one(*max - new_max);
    for (int64_t d = 0; d < stride; d += kLanes) store(acc + d, load(acc + d) * keep);
  }
  *sum = *sum * keep + ellm::ELLM_ISA::sum(weights);
  *max = new_max;
}

// Copies `tokens` rows of K or V to float32 rows of `stride` floats, zeros behind each, and zero
// rows up to `padded`.
template <class T>
static inline const float* copy_rows(const T* from, int64_t tokens, int64_t padded, int64_t dim,
                                     int64_t stride, float* to) {
  to_float(from, kTypeOf<T>, tokens, dim, stride, to);
  std::memset(to + tokens * stride, 0, (padded - tokens) * stride * sizeof(float));
  return to;
}

static inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
}

template <class T>
static void load_queries(const AttentionArgs& a, const AttentionUnit& u, float* q) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  const int64_t stride = acc_stride(a.kv.head_dim);
  int64_t r = 0;
  for (int64_t t = u.token_begin; t < u.token_end; ++t) {
    for (int64_t g = 0; g < group; ++g, ++r) {
      const T* from = static_cast<const T*>(a.q) +
                      ((u.span.row_begin + t) * a.q_heads + u.kv_head * group + g) * a.kv.head_dim;
      for (int64_t d = 0; d < stride; d += kLanes) {
        const int64_t left = a.kv.head_dim - d;
        const Vec v = left >= kLanes ? load(from + d) : load_part(from + d, left);
        store(q + r * stride + d, v * a.scale);
      }
    }
  }
}

template <class T>
static void write_rows(const AttentionArgs& a, const AttentionUnit& u, const SoftmaxState& s) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  const int64_t stride = acc_stride(a.kv.head_dim);
  int64_t r = 0;
  for (int64_t t = u.token_begin; t < u.token_end; ++t) {
    for (int64_t g = 0; g < group; ++g, ++r) {
      T* to = static_cast<T*>(a.out) +
              ((u.span.row_begin + t) * a.q_heads + u.kv_head * group + g) * a.kv.head_dim;
      const float inverse = 1.0f / s.sum[r];
      for (int64_t d = 0; d < a.kv.head_dim; ++d) put(to + d, s.acc[r * stride + d] * inverse);
    }
  }
}

// Adds a block of tokens, `padded` rows of k, to the rows' state.
template <class T>
static inline void attend_block(const AttentionArgs& a, const Workspace& w, int64_t rows,
                                const T* k, const T* v, int64_t padded) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  constexpr int MR = kLanes == 16 ? 4 : 2;
  int64_t r = 0;
  for (; r + MR <= rows; r += MR) {
    score_rows<MR>(w.q + r * stride, k, stride, padded, w.scores + r * kBlock);
  }
  for (; r < rows; ++r) {
    score_rows<1>(w.q + r * stride, k, stride, padded, w.scores + r * kBlock);
  }
  for (r = 0; r < rows; ++r) {
    softmax_row(a, w.scores + r * kBlock, padded, w.seen[r], w.part.max + r, w.part.sum + r,
                w.part.acc + r * stride, stride);
  }
  for (r = 0; r + 4 <= rows; r += 4) {
    weigh_seen<4>(w.seen + r, w.scores + r * kBlock, v, w.part.acc + r * stride, stride);
  }
  for (; r < rows; ++r) {
    weigh_seen<1>(w.seen + r, w.scores + r * kBlock, v, w.part.acc + r * stride, stride);
  }
}

// Adds the tokens [from, to) of one part, all inside tiles of the slot, to the rows' state.
template <class T>
static void attend_tokens(const AttentionArgs& a, const AttentionUnit& u, int64_t from, int64_t to,
                          const Workspace& w) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  const int64_t stride = acc_stride(a.kv.head_dim);
  const int64_t rows = (u.token_end - u.token_begin) * group;
  const int64_t first_position = u.span.context_tokens + u.token_begin;
  const char* slot = a.kv_base + u.span.slot * a.kv.slot_bytes;

  for (int64_t tile = from / a.kv.tile_tokens; tile * a.kv.tile_tokens < to; ++tile) {
    const int64_t tile_begin = tile * a.kv.tile_tokens;
    const char* head_k = slot + a.kv.offset_bytes(a.layer, 0, u.kv_head, tile_begin);
    const char* head_v = slot + a.kv.offset_bytes(a.layer, 1, u.kv_head, tile_begin);
    for (int64_t block = 0; block < a.kv.tile_tokens; block += kBlock) {
      const int64_t begin = tile_begin + block;
      const int64_t in_tile = min_of(kBlock, a.kv.tile_tokens - block);
      const int64_t end = min_of(begin + in_tile, to);
      if (end <= from || begin >= to) continue;
      const int64_t tokens = end - begin;
      const int64_t padded = round_up(tokens, kLanes);
      const T* k = reinterpret_cast<const T*>(head_k) + block * a.kv.head_dim;
      const T* v = reinterpret_cast<const T*>(head_v) + block * a.kv.head_dim;
      const int64_t ahead = end == to ? 0 : a.kv.chunk_bytes / static_cast<int64_t>(sizeof(T));
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t position = first_position + r / group;
        const int64_t first_seen = a.window > 0 ? max_of(0, position + 1 - a.window) : 0;
        w.seen[r] = {static_cast<int32_t>(max_of(max_of(first_seen, from), begin) - begin),
                     static_cast<int32_t>(min_of(position + 1, end) - begin)};
      }
      // Reading K in place goes up to padded rows, past the tile's end by fewer than kLanes: that
      // is V of the same chunk, whose scores softmax_row drops.
      if (a.kv.head_dim == stride && (sizeof(T) == sizeof(float) || rows <= kRowsInPlace)) {
        prefetch(k + ahead, tokens * a.kv.head_dim * sizeof(T));
        prefetch(v + ahead, tokens * a.kv.head_dim * sizeof(T));
        attend_block(a, w, rows, k, v, padded);
      } else {
        attend_block(a, w, rows, copy_rows(k, tokens, padded, a.kv.head_dim, stride, w.k),
                     copy_rows(v, tokens, tokens, a.kv.head_dim, stride, w.v), padded);
      }
    }
  }
}

template <class T>
static void attend_typed(const AttentionArgs& a, const AttentionUnit& u, float* scratch,
                         const SoftmaxState* partial) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  const int64_t stride = acc_stride(a.kv.head_dim);
  const int64_t rows = (u.token_end - u.token_begin) * group;
  Workspace w = carve(a, rows, scratch);
  load_queries<T>(a, u, w.q);
  if (!partial) reset(w.total, rows, stride);

  const int64_t first_position = u.span.context_tokens + u.token_begin;
  const int64_t last_position = u.span.context_tokens + u.token_end - 1;
  const int64_t first_seen = a.window > 0 ? max_of(0, first_position + 1 - a.window) : 0;
  for (int64_t part = u.part_begin; part < u.part_end; ++part) {
    if (partial) w.part = partial[part - u.part_begin];
    reset(w.part, rows, stride);
    const int64_t from = max_of(part * a.part_tokens, first_seen);
    const int64_t to = min_of((part + 1) * a.part_tokens, last_position + 1);
    if (from < to) attend_tokens<T>(a, u, from, to, w);
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
  const int64_t rows = (u.token_end - u.token_begin) * (a.q_heads / a.kv.kv_heads);
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
