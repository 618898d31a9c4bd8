// K and V of a block of tokens, gathered from the tiles of a slot into the order in which panels
// read them.
#include "kernels/cpu/panel.inl"

namespace ellm::ELLM_ISA {

// Tokens whose scores are held at once. Blocks are counted from the first token of a part; they
// know nothing of tiles.
constexpr int64_t kBlock = 64;

// Words of a row of n elements.
template <class Arithmetic>
constexpr int64_t words_of(int64_t n) {
  return (n + Arithmetic::kPerWord - 1) / Arithmetic::kPerWord;
}

static inline UVec bits_of(Vec v) {
  UVec u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}

// The kLanes words that begin at row, all of them elements of it. Where words are of int8, 128 is
// added to each.
template <class Arithmetic, class S>
static inline Vec whole_words(const S* row) {
  if constexpr (Arithmetic::kPerWord == 1) {
    return load(row);
  } else {
    Vec words = load(reinterpret_cast<const float*>(row));
    if constexpr (kInQuads<Arithmetic>) {
      const UVec flipped = bits_of(words) ^ 0x80808080u;
      std::memcpy(&words, &flipped, sizeof words);
    }
    return words;
  }
}

// The kLanes words of a row that begin at element i, zeros behind its n elements.
template <class Arithmetic, class S>
static inline Vec load_words(const S* row, int64_t i, int64_t n) {
  constexpr int64_t kWidth = kLanes * Arithmetic::kPerWord;
  if (n - i >= kWidth) return whole_words<Arithmetic>(row + i);
  S elements[kWidth] = {};
  std::memcpy(elements, row + i, (n - i) * sizeof(S));
  return whole_words<Arithmetic>(elements);
}

// Where the rows of a block's tokens begin; null where there is no token or none that is seen.
template <class S>
struct BlockRows {
  // What follows each other in memory: of the tokens of a tile the rows, or their scales.
  struct Run {
    const char* begin;
    const char* end;
  };
  enum Kind { kKeys, kKeyScales, kValues, kValueScales, kKinds };
  static constexpr int64_t kMaxRuns = kBlock / 8 + 1;  // Tiles are of 8 tokens or more.

  const S* k[kBlock];
  const S* v[kBlock];
  Run runs[kKinds][kMaxRuns];
  int64_t num_runs;  // of each kind, but for scales where there are none
  int64_t first;     // token with a row
};

// Tokens [low, high) of the block of a KV head that begins at token `begin`.
template <class S>
static inline void find_rows(const AttentionArgs& a, int64_t slot_index, int64_t head,
                             int64_t begin, int64_t low, int64_t high, BlockRows<S>* rows) {
  using Rows = BlockRows<S>;
  const char* slot = a.kv_base + slot_index * a.kv.slot_bytes;
  const int64_t row_bytes = a.kv.head_dim * static_cast<int64_t>(sizeof(S));
  rows->num_runs = 0;
  rows->first = low;
  for (int64_t j = 0; j < low; ++j) rows->k[j] = rows->v[j] = nullptr;
  int64_t left = a.kv.tile_tokens - (begin + low) % a.kv.tile_tokens;  // in the tile of token j
  for (int64_t j = low; j < high; left = a.kv.tile_tokens, ++rows->num_runs) {
    const int64_t count = min_of(high - j, left);
    const auto add = [&](typename Rows::Kind kind, int64_t offset_bytes, int64_t bytes_each) {
      const char* from = slot + offset_bytes;
      rows->runs[kind][rows->num_runs] = {from, from + count * bytes_each};
      return from;
    };
    const int64_t token = begin + j;
    const char* k = add(Rows::kKeys, a.kv.offset_bytes(a.layer, 0, head, token), row_bytes);
    const char* v = add(Rows::kValues, a.kv.offset_bytes(a.layer, 1, head, token), row_bytes);
    if constexpr (kScaled<S>) {
      constexpr int64_t kBytes = sizeof(float);
      add(Rows::kKeyScales, a.kv.scale_offset_bytes(a.layer, 0, head, token), kBytes);
      add(Rows::kValueScales, a.kv.scale_offset_bytes(a.layer, 1, head, token), kBytes);
    }
    for (const int64_t stop = j + count; j < stop; ++j, k += row_bytes, v += row_bytes) {
      rows->k[j] = reinterpret_cast<const S*>(k);
      rows->v[j] = reinterpret_cast<const S*>(v);
    }
  }
  for (int64_t j = max_of(low, high); j < kBlock; ++j) rows->k[j] = rows->v[j] = nullptr;
}

// to[j] = the scale of token j, 0 where there is no row; of kind kKeyScales or kValueScales.
template <class S>
static inline void load_scales(const BlockRows<S>& rows, typename BlockRows<S>::Kind kind,
                               float* to) {
  int64_t j = 0;
  for (; j < rows.first; ++j) to[j] = 0.0f;
  for (int64_t i = 0; i < rows.num_runs; ++i) {
    const auto& run = rows.runs[kind][i];
    std::memcpy(to + j, run.begin, run.end - run.begin);
    j += (run.end - run.begin) / static_cast<int64_t>(sizeof(float));
  }
  for (; j < kBlock; ++j) to[j] = 0.0f;
}

// Asks for the lines of a block, K first, while the block before it is worked on. A core waits for
// a limited number of lines at a time: asked for a few at each step of all of the work, they never
// queue up, and memory never rests.
template <class S>
class Ahead {
 public:
  explicit Ahead(const BlockRows<S>& rows) : rows_(rows) { go_on(); }

  // Lines of the block, nearly.
  int64_t lines() const {
    int64_t bytes = 0;
    for (int kind = 0; kind < BlockRows<S>::kKinds; kind += kStep) {
      for (int64_t i = 0; i < rows_.num_runs; ++i) {
        bytes += rows_.runs[kind][i].end - rows_.runs[kind][i].begin;
      }
    }
    return (bytes + int64_t{kLineBytes} - 1) / int64_t{kLineBytes};
  }

  void ask(int64_t lines) {
    for (; lines > 0; --lines) {
      __builtin_prefetch(reinterpret_cast<const void*>(at_), 0, 3);
      at_ += step_;
      if (at_ >= end_) go_on();
    }
  }

 private:
  static constexpr uintptr_t kLineBytes = 64;
  static constexpr int kStep = kScaled<S> ? 1 : 2;  // from a kind to the next there is

  void go_on() {
    if (run_ == rows_.num_runs) {
      run_ = 0;
      kind_ += kStep;
    }
    if (kind_ >= BlockRows<S>::kKinds || rows_.num_runs == 0) {
      // Nothing is left: from now on a line that is at hand.
      at_ = reinterpret_cast<uintptr_t>(&rows_);
      end_ = UINTPTR_MAX;
      step_ = 0;
      return;
    }
    const auto& run = rows_.runs[kind_][run_++];
    at_ = reinterpret_cast<uintptr_t>(run.begin) / kLineBytes * kLineBytes;
    end_ = reinterpret_cast<uintptr_t>(run.end);
  }

  const BlockRows<S>& rows_;
  int kind_ = 0;     // of the next run
  int64_t run_ = 0;  // the next one
  uintptr_t at_ = 0;
  uintptr_t end_ = 0;
  uintptr_t step_ = kLineBytes;
};

// to[i, n] = word i of load_row(n), for kLanes words and rows.
template <class LoadRow>
static inline void pack_square(const LoadRow& load_row, float* to) {
  Vec words[kLanes];
  for (int n = 0; n < kLanes; ++n) words[n] = load_row(n);
  transpose(words);
  for (int n = 0; n < kLanes; ++n) store(to + n * kBlock, words[n]);
}

// to[i, j] = word i of K of token j; zeros where there is no token. Asks for `lines` lines.
template <class Arithmetic, class S>
static void pack_k(const S* const* rows, Ahead<S>* ahead, int64_t lines, int64_t dim, float* to) {
  constexpr int64_t kWidth = kLanes * Arithmetic::kPerWord;
  const int64_t squares = kBlock / kLanes * ((dim + kWidth - 1) / kWidth);
  const int64_t lines_each = (lines + squares - 1) / squares;
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const bool present = rows[j] && rows[j + kLanes - 1];  // rows are missing at the ends only
    for (int64_t i = 0; i < dim; i += kWidth) {
      ahead->ask(lines_each);
      float* square = to + i / Arithmetic::kPerWord * kBlock + j;
      if (present && dim - i >= kWidth) {
        pack_square([&](int n) { return whole_words<Arithmetic>(rows[j + n] + i); }, square);
      } else {
        pack_square(
            [&](int n) {
              return rows[j + n] ? load_words<Arithmetic>(rows[j + n], i, dim) : Vec{};
            },
            square);
      }
    }
  }
}

// to[d] = V of one token, or of two in one word, from element d on; null is zeros. Both rows are of
// element type S and `dim` elements.
template <class Arithmetic, class S>
static inline void pack_v_words(const S* first, const S* second, int64_t d, int64_t dim,
                                float* to) {
  for (; d < dim; d += kLanes) {
    Vec words = first ? load_words<Floats>(first, d, dim) : Vec{};
    if constexpr (Arithmetic::kPerWord == 2) {
      // As float32 a bfloat16 is the upper half of its word.
      const Vec upper = second ? load_words<Floats>(second, d, dim) : Vec{};
      const UVec pair = bits_of(words) >> 16 | bits_of(upper);
      std::memcpy(&words, &pair, sizeof words);
    }
    store(to + d, words);
  }
}

#if defined(__AVX512BF16__)
// Elements d to d + 2 * kLanes of two rows, by turns.
static inline void interleave(const uint16_t* first, const uint16_t* second, Vec* low, Vec* high) {
  alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                    37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                    11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i of_low = _mm512_load_si512(kLow);
  const __m512i of_high = _mm512_add_epi16(of_low, _mm512_set1_epi16(kLanes));
  const __m512i a = _mm512_loadu_si512(first);
  const __m512i b = _mm512_loadu_si512(second);
  *low = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(a, of_low, b));
  *high = reinterpret_cast<Vec>(_mm512_permutex2var_epi16(a, of_high, b));
}
#endif

// to[n] = V of token i, or of tokens 2 i and 2 i + 1 in one word, for NR whole vectors from element
// d on. NR is even where words are pairs.
template <class Arithmetic, int NR, class S>
static inline void load_v_words(const S* const* rows, int64_t i, int64_t d, Vec (&to)[NR]) {
  if constexpr (Arithmetic::kPerWord == 1) {
    for (int n = 0; n < NR; ++n) to[n] = load(rows[i] + d + n * kLanes);
  } else {
#if defined(__AVX512BF16__)
    static_assert(NR % 2 == 0);
    for (int n = 0; n < NR; n += 2) {
      const int64_t at = d + n * kLanes;
      interleave(rows[2 * i] + at, rows[2 * i + 1] + at, &to[n], &to[n + 1]);
    }
#endif
  }
}

// to[j, d] = V of token j, or of tokens 2 j and 2 j + 1 in one word; zeros where there is no token.
// Rows of `stride` words. Asks for `lines` lines.
template <class Arithmetic, class S>
static void pack_v(const S* const* rows, Ahead<S>* ahead, int64_t lines, int64_t dim,
                   int64_t stride, float* to) {
  constexpr int64_t kWords = kBlock / Arithmetic::kPerWord;
  const int64_t lines_each = (lines + kWords - 1) / kWords;
  for (int64_t j = 0; j < kBlock; j += Arithmetic::kPerWord, to += stride) {
    const S* first = rows[j];
    const S* second = rows[j + Arithmetic::kPerWord - 1];
    ahead->ask(lines_each);
    int64_t d = 0;
    if constexpr (Arithmetic::kPerWord == 2) {
      for (; first && second && d + 2 * kLanes <= dim; d += 2 * kLanes) {
        Vec words[2];
        load_v_words<Arithmetic>(rows + j, 0, d, words);
        store(to + d, words[0]);
        store(to + d + kLanes, words[1]);
      }
    }
    pack_v_words<Arithmetic>(first, second, d, dim, to);
  }
}

// Whether no element of the tokens is NaN or infinite.
template <class T>
static bool all_finite(const T* const* rows, int64_t dim) {
  UVec bad = {};
  const UVec exponent = UVec{} + 0x7f800000u;
  for (int64_t j = 0; j < kBlock; ++j) {
    if (!rows[j]) continue;
    for (int64_t d = 0; d < dim; d += kLanes) {
      const UVec bits = bits_of(load_words<Floats>(rows[j], d, dim)) & exponent;
      bad |= bits == exponent ? exponent : UVec{};
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    if (bad[i]) return false;
  }
  return true;
}

}  // namespace ellm::ELLM_ISA
