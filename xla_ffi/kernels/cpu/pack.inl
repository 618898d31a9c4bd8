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

// The kLanes words of a row that begin at element i, zeros behind its n elements.
template <class Arithmetic, class T>
static inline Vec load_words(const T* row, int64_t i, int64_t n) {
  if constexpr (Arithmetic::kPerWord == 1) {
    return n - i >= kLanes ? load(row + i) : load_part(row + i, n - i);
  } else {
    T words[2 * kLanes] = {};
    const int64_t count = n - i >= 2 * kLanes ? 2 * kLanes : n - i;
    if (count == 2 * kLanes) return load(reinterpret_cast<const float*>(row + i));
    std::memcpy(words, row + i, count * sizeof(T));
    return load(reinterpret_cast<const float*>(words));
  }
}

// Where the rows of a block's tokens begin; null where there is no token or none that is seen.
template <class T>
struct BlockRows {
  const T* k[kBlock];
  const T* v[kBlock];
};

// Tokens [low, high) of the block that begins at token `begin`.
template <class T>
static inline void find_rows(const AttentionArgs& a, const AttentionUnit& u, int64_t begin,
                             int64_t low, int64_t high, BlockRows<T>* rows) {
  const char* slot = a.kv_base + u.span.slot * a.kv.slot_bytes;
  const int64_t dim = a.kv.head_dim;
  for (int64_t j = 0; j < low; ++j) rows->k[j] = rows->v[j] = nullptr;
  for (int64_t j = low; j < high;) {
    const int64_t in_tile = a.kv.tile_tokens - (begin + j) % a.kv.tile_tokens;
    const int64_t stop = min_of(high, j + in_tile);
    const T* k =
        reinterpret_cast<const T*>(slot + a.kv.offset_bytes(a.layer, 0, u.kv_head, begin + j));
    const T* v =
        reinterpret_cast<const T*>(slot + a.kv.offset_bytes(a.layer, 1, u.kv_head, begin + j));
    for (; j < stop; ++j, k += dim, v += dim) {
      rows->k[j] = k;
      rows->v[j] = v;
    }
  }
  for (int64_t j = max_of(low, high); j < kBlock; ++j) rows->k[j] = rows->v[j] = nullptr;
}

// Asks for the row of the next block that lies where `row`, of n elements from i on, is now. Spread
// over the packing of this block, the requests never queue up. A null row is harmless.
template <class T>
static inline void prefetch_part(const T* row, int64_t i, int64_t n) {
  constexpr uintptr_t kLineBytes = 64;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(row) + i * sizeof(T);
  for (uintptr_t at = begin; at < begin + n * sizeof(T); at += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 3);
  }
}

// The kLanes words that begin at row, all of them elements of it.
template <class Arithmetic, class T>
static inline Vec whole_words(const T* row) {
  if constexpr (Arithmetic::kPerWord == 1) {
    return load(row);
  } else {
    return load(reinterpret_cast<const float*>(row));
  }
}

// to[i, j] = word i of K of token j; zeros where there is no token. Asks for the rows `next`.
template <class Arithmetic, class T>
static void pack_k(const T* const* rows, const T* const* next, int64_t dim, float* to) {
  constexpr int64_t kWidth = kLanes * Arithmetic::kPerWord;
  for (int64_t j = 0; j < kBlock; j += kLanes) {
    const bool present = rows[j] && rows[j + kLanes - 1];  // rows are missing at the ends only
    for (int64_t i = 0; i < dim; i += kWidth) {
      Vec words[kLanes];
      for (int n = 0; n < kLanes; ++n) prefetch_part(next[j + n], i, kWidth);
      if (present && dim - i >= kWidth) {
        for (int n = 0; n < kLanes; ++n) words[n] = whole_words<Arithmetic>(rows[j + n] + i);
      } else {
        for (int n = 0; n < kLanes; ++n) {
          words[n] = rows[j + n] ? load_words<Arithmetic>(rows[j + n], i, dim) : Vec{};
        }
      }
      transpose(words);
      float* at = to + i / Arithmetic::kPerWord * kBlock + j;
      for (int n = 0; n < kLanes; ++n) store(at + n * kBlock, words[n]);
    }
  }
}

static inline UVec bits_of(Vec v) {
  UVec u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}

// to[d] = V of one token, or of two in one word, from element d on; null is zeros. Both rows are of
// element type T and `dim` elements.
template <class Arithmetic, class T>
static inline void pack_v_words(const T* first, const T* second, int64_t d, int64_t dim,
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

// pack_v_words of whole vectors of both rows, from element 0 on. Returns the first element that is
// left.
template <class Arithmetic, class T>
static inline int64_t interleave(const T* first, const T* second, int64_t dim, float* to) {
  int64_t d = 0;
#if defined(__AVX512BF16__)
  if constexpr (Arithmetic::kPerWord == 2) {
    alignas(64) static constexpr uint16_t kLow[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                      37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                      11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(kLanes));
    for (; d + 2 * kLanes <= dim; d += 2 * kLanes) {
      const __m512i a = _mm512_loadu_si512(first + d);
      const __m512i b = _mm512_loadu_si512(second + d);
      _mm512_storeu_si512(to + d, _mm512_permutex2var_epi16(a, low, b));
      _mm512_storeu_si512(to + d + kLanes, _mm512_permutex2var_epi16(a, high, b));
    }
  }
#endif
  return d;
}

// to[j, d] = V of token j, or of tokens 2 j and 2 j + 1 in one word; zeros where there is no token.
// Rows of `stride` words. Asks for the rows `next`.
template <class Arithmetic, class T>
static void pack_v(const T* const* rows, const T* const* next, int64_t dim, int64_t stride,
                   float* to) {
  for (int64_t j = 0; j < kBlock; j += Arithmetic::kPerWord, to += stride) {
    const T* first = rows[j];
    const T* second = rows[j + Arithmetic::kPerWord - 1];
    for (int n = 0; n < Arithmetic::kPerWord; ++n) prefetch_part(next[j + n], 0, dim);
    const int64_t d = first && second ? interleave<Arithmetic>(first, second, dim, to) : 0;
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
