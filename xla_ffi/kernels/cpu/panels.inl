// Linear layers over weights in panels; see panels.h. A sum is one accumulator that takes the
// inputs in their order, whatever is computed beside it.
#include "kernels/cpu/fetch.inl"
#include "kernels/cpu/panel.inl"
#include "kernels/cpu/panels.h"

namespace ellm::ELLM_ISA {

// Rows of x and vectors of outputs whose sums are in registers together.
constexpr int kTileRows = kLanes == 16 ? 6 : 4;
constexpr int tile_vectors(int rows) { return kLanes == 16 || rows <= 2 ? 4 : 2; }

// Pairs of inputs that are taken at a time: a panel's weights for so many stay in the level-2 cache
// while rows pass, and a tile's inputs in the level-1 cache. Sums wait in memory meanwhile, of so
// many rows at a time.
constexpr int64_t kPairsAtATime = 1024;
constexpr int64_t kRowsWaiting = 192;
// Rows from which on the next panel is asked for beside the products, every few pairs: with fewer
// the prefetchers follow the one stream of weights by themselves.
constexpr int64_t kRowsAhead = 9;
constexpr int64_t kPairsPerRequest = 4;

// Some columns of a panel: their weights for the first pair of inputs, and how many elements
// further on those for the next pair are.
struct Strip {
  const uint16_t* w;
  int64_t stride;
  int64_t columns;
};

// Vector v of a strip's weights for the pair at w, zeros behind the last column.
template <bool kWhole>
static inline UVec weights_of(const uint16_t* w, int64_t columns, int v) {
  UVec weights = {};
  const int64_t left = columns - v * kLanes;
  if (kWhole || left >= kLanes) {
    std::memcpy(&weights, w + 2 * v * kLanes, sizeof weights);
  } else if (left > 0) {
    std::memcpy(&weights, w + 2 * v * kLanes, left * 2 * sizeof *w);
  }
  return weights;
}

// acc[m * NV + v] += the products of the pair at x and w, for MR rows and NV vectors of columns. Of
// float32 the first input's, then the second's.
template <int MR, int NV, bool kWhole>
static inline void add_pair(const float* x, int64_t x_stride, const uint16_t* w, int64_t columns,
                            Vec* acc) {
  Vec first[NV], second[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    const UVec both = weights_of<kWhole>(w, columns, v);
    const UVec low = both << 16, high = both & 0xffff0000u;
    std::memcpy(&first[v], &low, sizeof low);
    std::memcpy(&second[v], &high, sizeof high);
  }
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    const Vec x0 = splat(x[m * x_stride]), x1 = splat(x[m * x_stride + 1]);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      acc[m * NV + v] = acc[m * NV + v] + x0 * first[v];
      acc[m * NV + v] = acc[m * NV + v] + x1 * second[v];
    }
  }
}

#if defined(__AVX512BF16__)
template <int MR, int NV, bool kWhole>
static inline void add_pair(const uint16_t* x, int64_t x_stride, const uint16_t* w, int64_t columns,
                            Vec* acc) {
  Vec both[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) both[v] = reinterpret_cast<Vec>(weights_of<kWhole>(w, columns, v));
#pragma GCC unroll 6
  for (int m = 0; m < MR; ++m) {
    const Vec xv = Pairs::spread(reinterpret_cast<const float*>(x + m * x_stride));
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      acc[m * NV + v] = Pairs::multiply_add(acc[m * NV + v], xv, both[v]);
    }
  }
}
#endif

// Rows [m, m + MR) times some columns over the pairs [begin, end), column 0 of the strip being
// column n of the result. Unless these are all pairs, the sums come from `waiting`, or go there.
template <int MR, bool kWhole, class X>
static inline void tile(const LinearArgs& a, int64_t m, int64_t n, const Strip& strip,
                        int64_t begin, int64_t end, float* waiting, Lines ahead) {
  constexpr int NV = tile_vectors(MR);
  const X* x = static_cast<const X*>(a.x) + m * a.x_stride;
  Vec acc[MR * NV];
#pragma GCC unroll 24
  for (int i = 0; i < MR * NV; ++i) acc[i] = begin == 0 ? Vec{} : load(waiting + i * kLanes);
  const int64_t requests = max_of(1, (end - begin) / kPairsPerRequest);
  const int64_t each = (ahead.left + requests - 1) / requests;
  int64_t pair = begin;
  for (; pair + kPairsPerRequest <= end; pair += kPairsPerRequest) {
    ahead.ask(each);
#pragma GCC unroll 4
    for (int64_t i = pair; i < pair + kPairsPerRequest; ++i) {
      add_pair<MR, NV, kWhole>(x + 2 * i, a.x_stride, strip.w + i * strip.stride, strip.columns,
                               acc);
    }
  }
  for (; pair < end; ++pair) {
    add_pair<MR, NV, kWhole>(x + 2 * pair, a.x_stride, strip.w + pair * strip.stride, strip.columns,
                             acc);
  }
  if (2 * end < a.k) {
#pragma GCC unroll 24
    for (int i = 0; i < MR * NV; ++i) store(waiting + i * kLanes, acc[i]);
    return;
  }
  for (int row = 0; row < MR; ++row) {
    for (int v = 0; v < NV && v * kLanes < strip.columns; ++v) {
      const int64_t at = (m + row) * a.n + n + v * kLanes;
      const int64_t columns = kWhole ? kLanes : strip.columns - v * kLanes;
      if (a.out_type == ElementType::kFloat32) {
        store_part(static_cast<float*>(a.out) + at, acc[row * NV + v], columns);
      } else {
        store_part(static_cast<uint16_t*>(a.out) + at, acc[row * NV + v], columns);
      }
    }
  }
}

// `rows` rows from m on, 1 to MR, times the panel of `width` outputs from n on.
template <int MR, class X>
static inline void panel_rows(const LinearArgs& a, int64_t rows, int64_t m, int64_t n,
                              int64_t width, int64_t begin, int64_t end, float* waiting,
                              LinesAhead* ahead) {
  if constexpr (MR > 1) {
    if (rows < MR) {
      return panel_rows<MR - 1, X>(a, rows, m, n, width, begin, end, waiting, ahead);
    }
  }
  constexpr int64_t kColumns = tile_vectors(MR) * kLanes;
  const uint16_t* w = static_cast<const uint16_t*>(a.w) + n * a.k;
  for (int64_t column = 0; column < width; column += kColumns, waiting += MR * kColumns) {
    const Strip strip = {w + 2 * column, 2 * width, min_of(kColumns, width - column)};
    const Lines lines = ahead->take();
    if (strip.columns == kColumns) {
      tile<MR, true, X>(a, m, n + column, strip, begin, end, waiting, lines);
    } else {
      tile<MR, false, X>(a, m, n + column, strip, begin, end, waiting, lines);
    }
  }
}

template <class X>
static void linear_panels_typed(const LinearArgs& a, const Columns& c) {
  float waiting[kRowsWaiting * kPanelOutputs];
  const int64_t pairs = a.k / 2;
  const int64_t pieces = (pairs + kPairsAtATime - 1) / kPairsAtATime;
  const int64_t most = pieces > 1 ? kRowsWaiting : a.rows;
  for (int64_t n = c.begin; n < c.end; n += kPanelOutputs) {
    const int64_t width = min_of(kPanelOutputs, a.n - n);
    LinesAhead ahead;
    if (a.rows >= kRowsAhead) {
      const int64_t next = min_of(n + width + kPanelOutputs, n + width < c.end ? c.end : c.ahead);
      const int64_t strips =
          (width + tile_vectors(kTileRows) * kLanes - 1) / (tile_vectors(kTileRows) * kLanes);
      const int64_t calls = (a.rows + kTileRows - 1) / kTileRows * pieces * strips;
      ahead = LinesAhead(static_cast<const uint16_t*>(a.w) + (n + width) * a.k,
                         (next - n - width) * a.k * static_cast<int64_t>(sizeof(uint16_t)), calls);
    }
    for (int64_t m_begin = 0; m_begin < a.rows; m_begin += most) {
      const int64_t m_end = min_of(m_begin + most, a.rows);
      for (int64_t begin = 0; begin < pairs; begin += kPairsAtATime) {
        const int64_t end = min_of(begin + kPairsAtATime, pairs);
        // Tiles of nearly the same height: 7 rows are 4 + 3, for 6 + 1 would pass w once more.
        int64_t tiles = (m_end - m_begin + kTileRows - 1) / kTileRows;
        for (int64_t m = m_begin; m < m_end; --tiles) {
          const int64_t rows = (m_end - m + tiles - 1) / tiles;
          panel_rows<kTileRows, X>(a, rows, m, n, width, begin, end,
                                   waiting + (m - m_begin) * kPanelOutputs, &ahead);
          m += rows;
        }
      }
    }
  }
}

static void linear_panels(const LinearArgs& a, const Columns& columns) {
#if defined(__AVX512BF16__)
  if (a.x_type == ElementType::kBFloat16) return linear_panels_typed<uint16_t>(a, columns);
#endif
  linear_panels_typed<float>(a, columns);
}

}  // namespace ellm::ELLM_ISA
