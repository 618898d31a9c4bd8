// Linear layers: rows of x against rows of w, both running along k. No packing: w is read in
// the [n, k] order in which checkpoints store it, so there is one copy of it in memory.
#include "kernels/cpu/rows.inl"

namespace ellm::ELLM_ISA {

// Accumulators that fit the register file beside the operands.
constexpr int kAccumulators = kLanes == 16 ? 16 : 8;

// Rows of a block of w that stays in the level-2 cache while all rows of x pass it.
constexpr int64_t kWeightBlockBytes = 256 * 1024;

template <int MR, class W, class Out>
static inline void linear_block(const float* x, int64_t x_stride, const W* w, int64_t k, int64_t n,
                                Out* out) {
  constexpr int NR = kAccumulators / MR;
  Vec acc[kAccumulators] = {};
  const int64_t full = k / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) {
    Vec xv[MR];
    for (int m = 0; m < MR; ++m) xv[m] = load(x + m * x_stride + i);
    for (int j = 0; j < NR; ++j) {
      const Vec wv = load(w + j * k + i);
      for (int m = 0; m < MR; ++m) acc[m * NR + j] += xv[m] * wv;
    }
  }
  if (full < k) {
    for (int j = 0; j < NR; ++j) {
      const Vec wv = load_part(w + j * k + full, k - full);
      for (int m = 0; m < MR; ++m) acc[m * NR + j] += load(x + m * x_stride + full) * wv;
    }
  }
  float sums[kAccumulators];
  for (int i = 0; i < kAccumulators; i += kLanes) store(sums + i, sum_each(acc + i));
  for (int m = 0; m < MR; ++m) {
    for (int j = 0; j < NR; ++j) put(out + m * n + j, sums[m * NR + j]);
  }
}

// One output at a time, in the order of linear_block: for the columns that fill no block.
template <class W, class Out>
static inline void linear_one(const float* x, const W* w, int64_t k, Out* out) {
  Vec acc = {};
  const int64_t full = k / kLanes * kLanes;
  for (int64_t i = 0; i < full; i += kLanes) acc += load(x + i) * load(w + i);
  if (full < k) acc += load(x + full) * load_part(w + full, k - full);
  put(out, sum(acc));
}

template <int MR, class W, class Out>
static inline void linear_rows(const LinearArgs& a, int64_t m, int64_t n_begin, int64_t n_end) {
  constexpr int NR = kAccumulators / MR;
  const float* x = a.x + m * a.x_stride;
  const W* w = static_cast<const W*>(a.w);
  Out* out = static_cast<Out*>(a.out) + m * a.n;
  int64_t n = n_begin;
  for (; n + NR <= n_end; n += NR) {
    linear_block<MR>(x, a.x_stride, w + n * a.k, a.k, a.n, out + n);
  }
  for (; n < n_end; ++n) {
    for (int i = 0; i < MR; ++i) linear_one(x + i * a.x_stride, w + n * a.k, a.k, out + i * a.n + n);
  }
}

template <class W, class Out>
static void linear_typed(const LinearArgs& a, int64_t n_begin, int64_t n_end) {
  const int64_t row_bytes = a.k * static_cast<int64_t>(sizeof(W));
  const int64_t step = max_of(kAccumulators, kWeightBlockBytes / row_bytes / 16 * 16);
  constexpr int MR = kLanes == 16 ? 4 : 2;
  for (int64_t n = n_begin; n < n_end; n += step) {
    const int64_t stop = min_of(n + step, n_end);
    int64_t m = 0;
    for (; m + MR <= a.rows; m += MR) linear_rows<MR, W, Out>(a, m, n, stop);
    if (MR > 2 && m + 2 <= a.rows) {
      linear_rows<2, W, Out>(a, m, n, stop);
      m += 2;
    }
    for (; m < a.rows; ++m) linear_rows<1, W, Out>(a, m, n, stop);
  }
}

static void linear(const LinearArgs& a, int64_t n_begin, int64_t n_end) {
  const bool w32 = a.w_type == ElementType::kFloat32;
  const bool out32 = a.out_type == ElementType::kFloat32;
  if (w32 && out32) linear_typed<float, float>(a, n_begin, n_end);
  if (w32 && !out32) linear_typed<float, uint16_t>(a, n_begin, n_end);
  if (!w32 && out32) linear_typed<uint16_t, float>(a, n_begin, n_end);
  if (!w32 && !out32) linear_typed<uint16_t, uint16_t>(a, n_begin, n_end);
}

}  // namespace ellm::ELLM_ISA
