// Attention over int8 K and V by products of int8, four in an instruction, which sums them in
// int32. Such sums are exact. So that nothing else is lost, q and the weights are taken in 16 bits:
// a high and a low byte, each with a product of its own,
//
//   q[d] = q_step (256 high[d] + low[d]),  weight[j] v_scale[j] = w_step (256 high[j] + low[j]),
//
// with a step for each row of q, and for each row of weights in each block of tokens.
#include "kernels/cpu/attention_panels.inl"

#if defined(__AVX512BF16__)

namespace ellm::ELLM_ISA {

// Below it a row counts as zero, as where K and V are quantised.
constexpr float kSmallest = 1e-30f;

// Rows of a panel, each with its high and its low bytes.
constexpr int kQuadRows = kPanelRows / 2;

// Some intrinsics are taken with a mask of all lanes: so the compiler sees no undefined operand.
constexpr __mmask16 kAll = 0xffff;

template <class To, class From>
static inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return reinterpret_cast<To>(v);
}

// The largest magnitude of both, as bits: infinities and NaNs come out on top.
static inline IVec larger_magnitude(IVec bits, Vec v) {
  return vmax(bits, as<IVec>(v) & 0x7fffffff);
}

// Numbers are about step * round(number * inverse).
struct Steps {
  Vec step;
  Vec inverse;
};

// In each lane those in which numbers up to the magnitude with these bits are at most `most`. Where
// that is not finite the step is NaN, and all numbers are 0.
static inline Steps steps_for(IVec bits, float most) {
  const Vec largest = as<Vec>(bits);
  const IVec counts = (largest >= splat(kSmallest)) & (bits < 0x7f800000);
  const Vec step = select(counts, largest * (1.0f / most), Vec{});
  return {select(bits < 0x7f800000, step, splat(__builtin_nanf(""))),
          select(counts, most / largest, Vec{})};
}

static inline IVec nearest(Vec v) { return as<IVec>(_mm512_maskz_cvtps_epi32(kAll, v)); }

// The low bytes of the first n numbers.
static inline void store_bytes(char* to, IVec numbers, int64_t n) {
  const BVec bytes = __builtin_convertvector(numbers, BVec);
  std::memcpy(to, &bytes, n);
}

// words[i] = the high bytes of elements 4 i to 4 i + 3, then the same of the low bytes, signed
// both. K is unsigned, with 128 on top: `bias` is 128 times the sum of the row.
template <class T>
static inline QueryStep quantize_query(const T* q, int64_t dim, float* words) {
  // The sum of dim products with int8 has to be an int32.
  const float most = static_cast<float>(min_of(127 * 256 + 127, INT32_MAX / 127 / dim));
  const int64_t bytes = (dim + 3) / 4 * 4;
  char* high = reinterpret_cast<char*>(words);
  std::memset(high, 0, 2 * bytes);
  IVec bits = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    bits = larger_magnitude(bits, load_up_to(q + d, dim - d));
  }
  const Steps steps = steps_for(largest_strides<1>(bits), most);
  const Vec inverse = splat(steps.inverse[0]);
  UVec total = {};
  for (int64_t d = 0; d < dim; d += kLanes) {
    const IVec x = nearest(load_up_to(q + d, dim - d) * inverse);
    const int64_t n = min_of(kLanes, dim - d);
    store_bytes(high + d, (x + 128) >> 8, n);
    store_bytes(high + bytes + d, x, n);  // without the high byte that leaves -128 to 127
    total += as<UVec>(x);
  }
  return {steps.step[0], static_cast<int32_t>(sum_strides<1>(total)[0] * 128u)};
}

// sums[m][n] = sum_i (256 high[m, i] + low[m, i]) * b[i, n]. Rows of `words` words: the high bytes
// of a row m, its low bytes, those of the next.
template <class Arithmetic, int MR, int NR, class Beside = Nothing>
static inline void multiply_halves(const float* a, const float* b, int64_t b_stride, int64_t words,
                                   int64_t row_words, IVec (&sums)[MR][NR],
                                   const Beside& beside = {}) {
  IVec halves[2 * MR][NR] = {};
  multiply_panel<Arithmetic>(a, row_words, b, b_stride, words, halves, beside);
  for (int m = 0; m < MR; ++m) {
    for (int n = 0; n < NR; ++n) {
      sums[m][n] = as<IVec>((as<UVec>(halves[2 * m][n]) << 8) + as<UVec>(halves[2 * m + 1][n]));
    }
  }
}

// score_rows of quantised q, and K as pack_k leaves it.
template <int MR, class Beside>
static inline void score_quads(const float* q, const QueryStep* steps, const float* k,
                               int64_t words, float factor, const float* scales, float* scores,
                               const Beside& beside) {
  constexpr int NR = kPanelVectors;
  for (int64_t j = 0; j < kBlock; j += NR * kLanes) {
    IVec sums[MR][NR];
    multiply_halves<KeyQuads>(q, k + j, kBlock, words, words, sums, beside);
    for (int m = 0; m < MR; ++m) {
      const UVec bias = UVec{} + static_cast<uint32_t>(steps[m].bias);
      for (int n = 0; n < NR; ++n) {
        const Vec sum = __builtin_convertvector(as<IVec>(as<UVec>(sums[m][n]) - bias), Vec);
        const Vec score = sum * (steps[m].step * factor) * load(scales + j + n * kLanes);
        store(scores + m * kBlock + j + n * kLanes, score);
      }
    }
  }
}

// The tokens of a block that are seen, a bit for each.
static inline uint64_t seen_bits(Seen seen) {
  if (seen.low >= seen.high) return 0;
  return ~uint64_t{0} << seen.low & ~uint64_t{0} >> (kBlock - seen.high);
}

// weigh_scores for V with scales, as float32: a weight takes that of its token with it, but the
// sums are of weights alone. `largest` becomes the bits of the largest by lane. One copy of the
// code for all callers, so that nothing is contracted in two ways.
[[gnu::noinline]] static Vec weigh_seen_scores(float* scores, float max, const float* scales,
                                               Seen seen, Vec sums, IVec* largest) {
  const uint64_t seen_tokens = seen_bits(seen);
  IVec bits = {};
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const Vec p = exp2_negative<Accuracy::kBFloat16>(load(scores + j) - max);
    sums += p;
    const auto those = static_cast<__mmask16>(seen_tokens >> j);
    const Vec weight = p * Vec(_mm512_maskz_loadu_ps(those, scales + j));
    store(scores + j, weight);
    bits = larger_magnitude(bits, weight);
  }
  *largest = bits;
  return sums;
}

// words[i] = the high bytes of weights 4 i to 4 i + 3 of a block, behind them the low bytes. May
// overwrite the weights.
static inline void split_weights(const float* weights, float inverse, float* words) {
  static_assert(kBlock == 4 * kLanes);
  __m512i x[4];
  for (int n = 0; n < 4; ++n) x[n] = as<__m512i>(nearest(load(weights + n * kLanes) * inverse));
  // Packing leaves word 4 i + j where 4 j + i belongs.
  const __m512i first = _mm512_packus_epi32(x[0], x[1]);
  const __m512i second = _mm512_packus_epi32(x[2], x[3]);
  const __m512i low_byte = _mm512_set1_epi16(0xff);
  const __m512i high =
      _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
  const __m512i low =
      _mm512_packus_epi16(_mm512_and_si512(first, low_byte), _mm512_and_si512(second, low_byte));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(words, _mm512_maskz_permutexvar_epi32(kAll, order, high));
  _mm512_storeu_si512(words + kBlock / 4, _mm512_maskz_permutexvar_epi32(kAll, order, low));
}

// Floats between the words of the weights of rows.
constexpr int64_t kWeightWords = kBlock / 2;

// soften_scores for rows [r, end): their weights as words, rows kWeightWords apart, each in steps
// of w.p_steps.
static void soften_to_quads(const AttentionArgs& a, const Workspace& w, int64_t r, int64_t end,
                            int64_t begin, int64_t low, int64_t high) {
  IVec largest[kRowsAtOnce];
  soften_scores(a, w, r, end, begin, low, high,
                [&](float* scores, int64_t row, float max, Vec sums) {
                  const Seen seen = seen_by(a, w.position[row], begin, low, high);
                  return weigh_seen_scores(scores, max, w.v_scales, seen, sums, largest + row - r);
                });
  const int64_t rows = end - r;
  for (int64_t m = rows; m < round_up(rows, kLanes); ++m) largest[m] = IVec{};
  for (int64_t first = 0; first < rows; first += kLanes) {
    const Steps steps = steps_for(largest_each(largest + first), 65535.0f);
    store(w.p_steps + first, steps.step);
    // Words take half the room of the weights, so they overwrite only rows that are done.
    for (int64_t m = first; m < min_of(rows, first + kLanes); ++m) {
      split_weights(w.scores + m * kBlock, steps.inverse[m - first], w.scores + m * kWeightWords);
    }
  }
}

// to[j, d] = V of tokens 4 j to 4 j + 3 in one word; zeros where there is no token. Rows of
// `stride` words. Asks for `lines` lines.
static void pack_v_quads(const int8_t* const* rows, Ahead<int8_t>* ahead, int64_t lines,
                         int64_t dim, int64_t stride, float* to) {
  constexpr int64_t kWidth = 4 * kLanes;
  constexpr int64_t kWords = kBlock / 4;
  const int64_t lines_each = (lines + kWords - 1) / kWords;
  for (int64_t j = 0; j < kBlock; j += 4, to += stride) {
    ahead->ask(lines_each);
    for (int64_t d = 0; d < dim; d += kWidth) {
      const __mmask64 there = dim - d >= kWidth ? ~0ull : (1ull << (dim - d)) - 1;
      __m512i r[4];
      for (int i = 0; i < 4; ++i) {
        r[i] = rows[j + i] ? _mm512_maskz_loadu_epi8(there, rows[j + i] + d) : __m512i{};
      }
      const __m512i low[2] = {_mm512_unpacklo_epi8(r[0], r[1]), _mm512_unpacklo_epi8(r[2], r[3])};
      const __m512i high[2] = {_mm512_unpackhi_epi8(r[0], r[1]), _mm512_unpackhi_epi8(r[2], r[3])};
      // Words in order within each quarter of 16 elements; the quarters of a vector lie 16 apart.
      const __m512i t0 = _mm512_unpacklo_epi16(low[0], low[1]);
      const __m512i t1 = _mm512_unpackhi_epi16(low[0], low[1]);
      const __m512i t2 = _mm512_unpacklo_epi16(high[0], high[1]);
      const __m512i t3 = _mm512_unpackhi_epi16(high[0], high[1]);
      const __m512i s0 = _mm512_maskz_shuffle_i32x4(kAll, t0, t1, 0x44);
      const __m512i s1 = _mm512_maskz_shuffle_i32x4(kAll, t0, t1, 0xee);
      const __m512i s2 = _mm512_maskz_shuffle_i32x4(kAll, t2, t3, 0x44);
      const __m512i s3 = _mm512_maskz_shuffle_i32x4(kAll, t2, t3, 0xee);
      const __m512i words[4] = {_mm512_maskz_shuffle_i32x4(kAll, s0, s2, 0x88),
                                _mm512_maskz_shuffle_i32x4(kAll, s0, s2, 0xdd),
                                _mm512_maskz_shuffle_i32x4(kAll, s1, s3, 0x88),
                                _mm512_maskz_shuffle_i32x4(kAll, s1, s3, 0xdd)};
      for (int n = 0; n < 4 && d + n * kLanes < stride; ++n) {
        _mm512_storeu_si512(to + d + n * kLanes, words[n]);
      }
    }
  }
}

// weigh_rows of the bytes that soften_to_quads leaves, and V as pack_v_quads does.
template <int MR, int NR = kPanelVectors>
static inline void weigh_rows_quads(const float* p, const float* keep, const float* steps,
                                    const float* v, int64_t stride, int64_t words, int64_t d,
                                    float* acc) {
  for (; d + NR * kLanes <= stride; d += NR * kLanes) {
    IVec sums[MR][NR];
    multiply_halves<WeightQuads>(p, v + d, stride, words, kBlock / 4, sums);
    for (int m = 0; m < MR; ++m) {
      for (int n = 0; n < NR; ++n) {
        // Not left to the compiler: it may contract the one product or the other.
        float* at = acc + m * stride + d + n * kLanes;
        const Vec kept = load(at) * keep[m];
        store(at, _mm512_fmadd_ps(__builtin_convertvector(sums[m][n], Vec),
                                  _mm512_set1_ps(steps[m]), kept));
      }
    }
  }
  if constexpr (NR > 1) weigh_rows_quads<MR, NR / 2>(p, keep, steps, v, stride, words, d, acc);
}

// Adds tokens [low, high) of the packed block that begins at token `begin` to the states of `rows`
// rows; each takes those that it sees.
template <class Beside = Nothing>
static void attend_quad_rows(const AttentionArgs& a, const Workspace& w, int64_t rows,
                             int64_t begin, int64_t low, int64_t high, const Beside& beside = {}) {
  const int64_t stride = acc_stride(a.kv.head_dim);
  const int64_t words = words_of<Quads>(a.kv.head_dim);
  const float factor = score_factor(a);
  for_seeing_rows(a, w, 0, rows, begin, low, high, [&](int64_t first, int64_t end) {
    for_panels<kQuadRows>(first, end, [&](auto height, int64_t m) {
      score_quads<height>(w.q + m * q_stride<Quads>(a.kv.head_dim), w.q_steps + m, w.k, words,
                          factor, w.k_scales, w.scores + (m - first) * kBlock, beside);
    });
    soften_to_quads(a, w, first, end, begin, low, high);
    for_panels<kQuadRows>(first, end, [&](auto height, int64_t m) {
      weigh_rows_quads<height>(w.scores + (m - first) * kWeightWords, w.keep + (m - first),
                               w.p_steps + (m - first), w.v, stride, words_of<Quads>(high), 0,
                               w.part.acc + m * stride);
    });
  });
}

// attend_block over int8: adds tokens [low, high) of the block that begins at token `begin`, whose
// scales are loaded, to the states of `rows` rows, and asks for the block `next`. V is finite; what
// may not be are scales, of which each row takes its own.
static void attend_quads(const AttentionArgs& a, const Workspace& w, int64_t rows,
                         const BlockRows<int8_t>& block, const BlockRows<int8_t>& next,
                         int64_t begin, int64_t low, int64_t high) {
  const int64_t dim = a.kv.head_dim;
  Ahead<int8_t> ahead(next);
  const int64_t lines = ahead.lines();
  const bool few = rows <= kPanelRows;
  // Where rows are few, what comes after packing takes about half of the time.
  const int64_t lines_packing = few ? lines * 3 / 8 : lines / 2;
  pack_k<Quads>(block.k, &ahead, lines_packing, dim, w.k);
  pack_v_quads(block.v, &ahead, lines_packing, dim, acc_stride(dim), w.v);
  if (few) {
    const int64_t steps = words_of<Quads>(dim) * divide_up(rows, kQuadRows);
    const int64_t lines_each = divide_up(lines / 4, steps);
    attend_quad_rows(a, w, rows, begin, low, high, [&] { ahead.ask(lines_each); });
  } else {
    attend_quad_rows(a, w, rows, begin, low, high);
  }
}

}  // namespace ellm::ELLM_ISA

#endif
