// Rows of x times weights in panels, tile by tile; see panels.h. A sum is one accumulator that
// takes the words in their order, whatever is computed beside it.
//
// What a word is, and what becomes of a sum, says a type P:
//   P::Sum                    a vector of sums
//   P::Args                   with w, rows, n, out, out_type and finish
//   P::words(args)            of a row
//   P::add<MR, NV, kWhole>(args, m, word, w, columns, acc)
//                             acc[i * NV + v] += the products of a word of row m + i and vector v
//                             of the weights at w, for MR rows and NV vectors of columns
//   P::number(args, m, n, sum, columns)
//                             the products of columns [n, n + columns), up to a vector, of row m
#include "kernels/cpu/fetch.inl"
#include "kernels/cpu/gate.inl"
#include "kernels/cpu/panels.h"

namespace ellm::ELLM_ISA {

// Rows of x and vectors of outputs whose sums are in registers together.
constexpr int kTileRows = kLanes == 16 ? 6 : 4;
constexpr int tile_vectors(int rows) { return kLanes == 16 || rows <= 2 ? 4 : 2; }

// Words that are taken at a time: a panel's weights for so many stay in the level-2 cache while
// rows pass, and a tile's inputs in the level-1 cache. Sums wait in memory meanwhile, of so many
// rows at a time.
constexpr int64_t kWordsAtATime = 1024;
constexpr int64_t kRowsWaiting = 192;
// Rows from which on the next panel is asked for beside the products, every few words: with fewer
// the prefetchers follow the one stream of weights by themselves.
constexpr int64_t kRowsAhead = 9;
constexpr int64_t kWordsPerRequest = 4;

// Vector v of the weights at w for a word, zeros behind the last column.
template <bool kWhole>
static inline UVec word_vector(const char* w, int64_t columns, int v) {
  UVec weights = {};
  const int64_t left = columns - v * kLanes;
  if (kWhole || left >= kLanes) {
    std::memcpy(&weights, w + v * kLanes * kWordBytes, sizeof weights);
  } else if (left > 0) {
    std::memcpy(&weights, w + v * kLanes * kWordBytes, left * kWordBytes);
  }
  return weights;
}

// Some columns of a panel: their weights for the first word, how far on those for the next one are,
// and how many they are.
struct Strip {
  const char* w;
  int64_t stride;
  int64_t columns;
};

// Where the results of some rows and columns go.
struct Place {
  char* at;
  int64_t row_bytes;
};

static inline Vec rounded_to_bf16(Vec v) {
  uint16_t lanes[kLanes];
  store(lanes, v);
  return load(lanes);
}

// Puts the products of columns [n, n + columns) of row m where they belong.
template <class Args>
static inline void put_finished(const Args& a, int64_t m, int64_t n, Vec v, int64_t columns,
                                char* to) {
  if (a.out_type == ElementType::kFloat32) {
    return store_part(reinterpret_cast<float*>(to), v, columns);
  }
  const Finish& finish = a.finish;
  if (finish.bias) v = rounded_to_bf16(v) + load_up_to(finish.bias + n, columns);
  if (finish.add) v = rounded_to_bf16(v) + load_up_to(finish.add + m * a.n + n, columns);
  store_part(reinterpret_cast<uint16_t*>(to), v, columns);
}

// Rows [m, m + MR) times some columns over the words [begin, end), column 0 of the strip being
// column n. Unless these are all words, the sums come from `waiting`, or go there.
template <class P, int MR, bool kWhole>
static inline void tile(const typename P::Args& a, int64_t m, int64_t n, const Strip& strip,
                        int64_t begin, int64_t end, typename P::Sum* waiting, Place place,
                        Lines ahead) {
  constexpr int NV = tile_vectors(MR);
  typename P::Sum acc[MR * NV];
#pragma GCC unroll 24
  for (int i = 0; i < MR * NV; ++i) acc[i] = begin == 0 ? typename P::Sum{} : waiting[i];
  const int64_t requests = max_of(1, (end - begin) / kWordsPerRequest);
  const int64_t each = (ahead.left + requests - 1) / requests;
  int64_t word = begin;
  for (; word + kWordsPerRequest <= end; word += kWordsPerRequest) {
    ahead.ask(each);
#pragma GCC unroll 4
    for (int64_t i = word; i < word + kWordsPerRequest; ++i) {
      P::template add<MR, NV, kWhole>(a, m, i, strip.w + i * strip.stride, strip.columns, acc);
    }
  }
  for (; word < end; ++word) {
    P::template add<MR, NV, kWhole>(a, m, word, strip.w + word * strip.stride, strip.columns, acc);
  }
  if (end < P::words(a)) {
#pragma GCC unroll 24
    for (int i = 0; i < MR * NV; ++i) waiting[i] = acc[i];
    return;
  }
  for (int row = 0; row < MR; ++row) {
    for (int v = 0; v < NV && v * kLanes < strip.columns; ++v) {
      const int64_t columns = kWhole ? kLanes : min_of(kLanes, strip.columns - v * kLanes);
      const int64_t first = n + v * kLanes;
      put_finished(a, m + row, first, P::number(a, m + row, first, acc[row * NV + v], columns),
                   columns,
                   place.at + row * place.row_bytes + v * kLanes * element_bytes(a.out_type));
    }
  }
}

// `rows` rows from m on, 1 to MR, times the panel of `width` outputs from n on.
template <class P, int MR>
static inline void panel_rows(const typename P::Args& a, int64_t rows, int64_t m, int64_t n,
                              int64_t width, int64_t begin, int64_t end, typename P::Sum* waiting,
                              LinesAhead* ahead) {
  if constexpr (MR > 1) {
    if (rows < MR) {
      return panel_rows<P, MR - 1>(a, rows, m, n, width, begin, end, waiting, ahead);
    }
  }
  constexpr int NV = tile_vectors(MR);
  const char* w = reinterpret_cast<const char*>(a.w) + n * P::words(a) * kWordBytes;
  char* const out = static_cast<char*>(a.out);
  const int64_t bytes = element_bytes(a.out_type);
  uint16_t pairs[MR * kPanelOutputs];  // gates and ups
  const Place place = a.finish.gated ? Place{reinterpret_cast<char*>(pairs), width * bytes}
                                     : Place{out + (m * a.n + n) * bytes, a.n * bytes};
  for (int64_t column = 0; column < width; column += NV * kLanes, waiting += MR * NV) {
    const int64_t columns = min_of(NV * kLanes, width - column);
    const Strip strip = {w + column * kWordBytes, width * kWordBytes, columns};
    const Place here = {place.at + column * bytes, place.row_bytes};
    const Lines lines = ahead->take();
    if (columns == NV * kLanes) {
      tile<P, MR, true>(a, m, n + column, strip, begin, end, waiting, here, lines);
    } else {
      tile<P, MR, false>(a, m, n + column, strip, begin, end, waiting, here, lines);
    }
  }
  if (a.finish.gated && end == P::words(a)) {
    for (int row = 0; row < MR; ++row) {
      auto* const to = reinterpret_cast<uint16_t*>(out) + ((m + row) * a.n + n) / 2;
      silu_mul_typed(pairs + row * width, to, 1, width / 2);
    }
  }
}

// All rows times the columns, which begin at a panel.
template <class P>
static void panel_columns(const typename P::Args& a, const Columns& c) {
  typename P::Sum waiting[kRowsWaiting * kPanelOutputs / kLanes];
  constexpr int64_t kStrips = kPanelOutputs / (tile_vectors(kTileRows) * kLanes);
  const int64_t words = P::words(a);
  const int64_t pieces = (words + kWordsAtATime - 1) / kWordsAtATime;
  const int64_t most = pieces > 1 ? kRowsWaiting : a.rows;
  for (int64_t n = c.begin; n < c.end; n += kPanelOutputs) {
    const int64_t width = min_of(kPanelOutputs, a.n - n);
    LinesAhead ahead;
    if (a.rows >= kRowsAhead) {
      const int64_t next = n + width;
      const int64_t stop = min_of(next + kPanelOutputs, next < c.end ? c.end : c.ahead);
      const int64_t calls = (a.rows + kTileRows - 1) / kTileRows * pieces * kStrips;
      ahead = LinesAhead(reinterpret_cast<const char*>(a.w) + next * words * kWordBytes,
                         (stop - next) * words * kWordBytes, calls);
    }
    for (int64_t m_begin = 0; m_begin < a.rows; m_begin += most) {
      const int64_t m_end = min_of(m_begin + most, a.rows);
      for (int64_t begin = 0; begin < words; begin += kWordsAtATime) {
        const int64_t end = min_of(begin + kWordsAtATime, words);
        // Tiles of nearly the same height: 7 rows are 4 + 3, for 6 + 1 would pass w once more.
        int64_t tiles = (m_end - m_begin + kTileRows - 1) / kTileRows;
        for (int64_t m = m_begin; m < m_end; --tiles) {
          const int64_t rows = (m_end - m + tiles - 1) / tiles;
          panel_rows<P, kTileRows>(a, rows, m, n, width, begin, end,
                                   waiting + (m - m_begin) * kPanelOutputs / kLanes, &ahead);
          m += rows;
        }
      }
    }
  }
}

}  // namespace ellm::ELLM_ISA
