// Linear layers: rows of x against rows of w, both running along k. No packing: w is read in
// the [n, k] order in which checkpoints store it, so there is one copy of it in memory.
#include "kernels/cpu/panel.inl"

namespace ellm::ELLM_ISA {

// Rows of x that share each load of w, at most.
constexpr int kMaxRows = kLanes == 16 ? 6 : 3;

// Columns of a block of MR rows: its accumulators fill the register file beside the operands.
constexpr int columns_for(int mr) {
  if (kLanes == 16) return mr == 1 ? 16 : mr <= 3 ? 8 : 4;
  return mr == 1 ? 8 : mr == 2 ? 6 : 4;
}

// Words along k that a high panel of x takes at a time: such a piece of it stays in the level-1
// cache while w passes. A low panel waits for w in any case, and w comes fastest in long rows.
constexpr int64_t kDepth = 1024;
constexpr bool in_pieces(int mr) { return 3 * mr > 2 * kMaxRows; }

// Columns whose sums wait while the panel goes on along k.
constexpr int64_t kMaxColumns = 48;

// Rows of a block of w that stays in the level-2 cache while all rows of x pass it.
constexpr int64_t kWeightBlockBytes = 256 * 1024;

// to[i] = sum of vectors[i], in groups of a power of two; writes up to kLanes floats more.
template <int Count, int Group = kLanes>
static inline void sum_all(const Vec* vectors, float* to) {
  if constexpr (Group > Count) {
    sum_all<Count, Group / 2>(vectors, to);
  } else {
    store(to, sum_strides<Group>(sum_each<Group>(vectors)));
    if constexpr (Count > Group) sum_all<Count - Group, Group>(vectors + Group, to + Group);
  }
}

// How x and w are read along k: kWidth elements at a time, as float32 or as pairs of bfloat16.
template <class X, class W>
struct Along {
  using Arithmetic = std::conditional_t<sizeof(X) == 2, Pairs, Floats>;
  static constexpr int64_t kWidth = kLanes * Arithmetic::kPerWord;
  template <class T>
  static inline Vec whole(const T* p) {
    if constexpr (Arithmetic::kPerWord == 1) {
      return load(p);
    } else {
      return load(reinterpret_cast<const float*>(p));
    }
  }
  template <class T>
  static inline Vec part(const T* p, int64_t left) {
    T padded[kWidth] = {};
    std::memcpy(padded, p, left * sizeof(T));
    return whole(padded);
  }
};

// Adds elements [k_begin, k_end) to the sums; the last call, with k_end == k, writes them to `out`.
// Between calls they wait in `carry`, MR * NR vectors.
template <int MR, int NR, class X, class W, class Out>
static inline void linear_block(const X* x, int64_t x_stride, const W* w, int64_t k,
                                int64_t k_begin, int64_t k_end, float* carry, int64_t n, Out* out) {
  using Read = Along<X, W>;
  constexpr int64_t kWidth = Read::kWidth;
  Vec acc[MR * NR] = {};
  if (in_pieces(MR) && k_begin > 0) {
    for (int i = 0; i < MR * NR; ++i) acc[i] = load(carry + i * kLanes);
  }
  const int64_t full = (in_pieces(MR) ? k_end : k) / kWidth * kWidth;
  for (int64_t i = in_pieces(MR) ? k_begin : 0; i < full; i += kWidth) {
    Vec xv[MR];
    for (int m = 0; m < MR; ++m) xv[m] = Read::whole(x + m * x_stride + i);
    for (int j = 0; j < NR; ++j) {
      const Vec wv = Read::whole(w + j * k + i);
      for (int m = 0; m < MR; ++m) {
        acc[m * NR + j] = Read::Arithmetic::multiply_add(acc[m * NR + j], xv[m], wv);
      }
    }
  }
  if (in_pieces(MR) && k_end < k) {
    for (int i = 0; i < MR * NR; ++i) store(carry + i * kLanes, acc[i]);
    return;
  }
  if (full < k) {
    Vec xv[MR];
    for (int m = 0; m < MR; ++m) xv[m] = Read::part(x + m * x_stride + full, k - full);
    for (int j = 0; j < NR; ++j) {
      const Vec wv = Read::part(w + j * k + full, k - full);
      for (int m = 0; m < MR; ++m) {
        acc[m * NR + j] = Read::Arithmetic::multiply_add(acc[m * NR + j], xv[m], wv);
      }
    }
  }
  float sums[MR * NR + kLanes];
  sum_all<MR * NR>(acc, sums);
  Out results[MR * NR + kLanes];
  for (int i = 0; i < MR * NR; i += kLanes) store(results + i, load(sums + i));
  for (int m = 0; m < MR; ++m) std::memcpy(out + m * n, results + m * NR, NR * sizeof(Out));
}

// One output at a time, in the order of linear_block: for the columns that fill no block.
template <class X, class W, class Out>
static inline void linear_one(const X* x, const W* w, int64_t k, Out* out) {
  using Read = Along<X, W>;
  Vec acc = {};
  const int64_t full = k / Read::kWidth * Read::kWidth;
  for (int64_t i = 0; i < full; i += Read::kWidth) {
    acc = Read::Arithmetic::multiply_add(acc, Read::whole(x + i), Read::whole(w + i));
  }
  if (full < k) {
    acc = Read::Arithmetic::multiply_add(acc, Read::part(x + full, k - full),
                                         Read::part(w + full, k - full));
  }
  put(out, sum(acc));
}

template <int MR, class X, class W, class Out>
static inline void linear_rows(const LinearArgs& a, int64_t m, int64_t n_begin, int64_t n_end) {
  constexpr int NR = columns_for(MR);
  constexpr int64_t kPiece = kDepth * Along<X, W>::Arithmetic::kPerWord;
  const X* x = static_cast<const X*>(a.x) + m * a.x_stride;
  const W* w = static_cast<const W*>(a.w);
  Out* out = static_cast<Out*>(a.out) + m * a.n;
  float carry[MR * kMaxColumns * kLanes];
  int64_t k_begin = 0;
  do {
    const int64_t k_end = in_pieces(MR) ? min_of(k_begin + kPiece, a.k) : a.k;
    float* at = carry;
    int64_t n = n_begin;
    for (; n + NR <= n_end; n += NR, at += MR * NR * kLanes) {
      linear_block<MR, NR>(x, a.x_stride, w + n * a.k, a.k, k_begin, k_end, at, a.n, out + n);
    }
    for (; n + 4 <= n_end; n += 4, at += MR * 4 * kLanes) {
      linear_block<MR, 4>(x, a.x_stride, w + n * a.k, a.k, k_begin, k_end, at, a.n, out + n);
    }
    k_begin = k_end;
  } while (in_pieces(MR) && k_begin < a.k);
  for (int64_t n = n_end - (n_end - n_begin) % NR % 4; n < n_end; ++n) {
    for (int i = 0; i < MR; ++i)
      linear_one(x + i * a.x_stride, w + n * a.k, a.k, out + i * a.n + n);
  }
}

// linear_rows for `mr` rows, 1 to MR.
template <int MR, class X, class W, class Out>
static inline void linear_panel(const LinearArgs& a, int64_t mr, int64_t m, int64_t n_begin,
                                int64_t n_end) {
  if (mr == MR) return linear_rows<MR, X, W, Out>(a, m, n_begin, n_end);
  if constexpr (MR > 1) linear_panel<MR - 1, X, W, Out>(a, mr, m, n_begin, n_end);
}

template <class X, class W, class Out>
static void linear_typed(const LinearArgs& a, int64_t n_begin, int64_t n_end) {
  const int64_t row_bytes = a.k * static_cast<int64_t>(sizeof(W));
  // Multiples of 24 leave no columns over for any block.
  const int64_t fitting = max_of(24, kWeightBlockBytes / row_bytes / 24 * 24);
  const int64_t step = min_of(kMaxColumns, a.rows <= kMaxRows ? kMaxColumns : fitting);
  for (int64_t n = n_begin; n < n_end; n += step) {
    const int64_t stop = min_of(n + step, n_end);
    // Panels of nearly the same height: 7 rows are 4 + 3, for 6 + 1 would read w once more alone.
    int64_t panels = (a.rows + kMaxRows - 1) / kMaxRows;
    for (int64_t m = 0; m < a.rows; --panels) {
      const int64_t mr = (a.rows - m + panels - 1) / panels;
      linear_panel<kMaxRows, X, W, Out>(a, mr, m, n, stop);
      m += mr;
    }
  }
}

template <class X, class W>
static void linear_to(const LinearArgs& a, int64_t n_begin, int64_t n_end) {
  if (a.out_type == ElementType::kFloat32) {
    linear_typed<X, W, float>(a, n_begin, n_end);
  } else {
    linear_typed<X, W, uint16_t>(a, n_begin, n_end);
  }
}

static void linear(const LinearArgs& a, int64_t n_begin, int64_t n_end) {
  if (a.w_type == ElementType::kFloat32) return linear_to<float, float>(a, n_begin, n_end);
  if constexpr (kHasPairs) {
    if (a.x_type == ElementType::kBFloat16) {
      return linear_to<uint16_t, uint16_t>(a, n_begin, n_end);
    }
  }
  linear_to<float, uint16_t>(a, n_begin, n_end);
}

}  // namespace ellm::ELLM_ISA
