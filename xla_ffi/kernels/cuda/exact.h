// Attention with plain float32 arithmetic in one order, for any element type and head size: what
// parity is checked with, and what serves head sizes that the tensor core kernels do not take.
#pragma once

#include "kernels/cuda/prepare.h"

namespace ellm::cuda {

constexpr int32_t kExactThreads = 128;
constexpr int32_t kExactHeadDim = 256;  // the largest

// float32 as an element type.
struct Float32 {};

template <class E>
ELLM_DEVICE float element(const char* row, int32_t i) {
  return E::widen(reinterpret_cast<const uint16_t*>(row)[i]);
}
template <>
ELLM_DEVICE float element<Float32>(const char* row, int32_t i) {
  return reinterpret_cast<const float*>(row)[i];
}

template <class E>
ELLM_DEVICE void set_element(char* row, int32_t i, float value) {
  reinterpret_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(E::pack(value, 0.0f));
}
template <>
ELLM_DEVICE void set_element<Float32>(char* row, int32_t i, float value) {
  reinterpret_cast<float*>(row)[i] = value;
}

ELLM_DEVICE float exp2_exact(float x) { return exp2f(x); }

// One warp for each row and query head. A score is summed along the head, values are added token by
// token; the context is taken in blocks of 32 tokens at absolute multiples, a token per lane.
template <class E>
ELLM_KERNEL void ELLM_LAUNCH_BOUNDS(kExactThreads, 1) exact(const AttentionArgs args) {
  constexpr int32_t kColumns = kExactHeadDim / kWarp;  // that a lane may hold
  const int32_t lane = thread_index() % kWarp;
  const int32_t warp = thread_index() / kWarp;
  const int64_t index = int64_t{block_index()} * (kExactThreads / kWarp) + warp;
  const int32_t row = static_cast<int32_t>(index / args.q_heads);
  const int32_t head = static_cast<int32_t>(index % args.q_heads);
  if (row >= args.step.num_rows()) return;

  const SequenceSpan span = args.step.span(find_span(args.step, row));
  const int32_t layer = args.layer[0];
  const int32_t window = args.window[0];
  const int32_t position = span.context_tokens + row - span.row_begin;
  const int32_t begin = first_seen(position, window);
  const int32_t kv_head = args.group.quotient(head);
  const char* keys = args.kv.head(span.slot, layer, 0, kv_head);
  const char* values = args.kv.head(span.slot, layer, 1, kv_head);

  const int64_t offset = (int64_t{row} * args.q_heads + head) * args.kv.row_bytes;
  float* query = reinterpret_cast<float*>(shared_memory()) + warp * kExactHeadDim;
  for (int32_t d = lane; d < args.head_dim; d += kWarp) {
    query[d] = element<E>(static_cast<const char*>(args.q) + offset, d);
  }
  sync_warp();

  float max = kMinusInfinity;
  float sum = 0.0f;
  float sums[kColumns] = {};
  for (int32_t block = begin / kWarp * kWarp; block <= position; block += kWarp) {
    const int32_t token = block + lane;
    float score = kMinusInfinity;
    if (token >= begin && token <= position) {
      const char* key = keys + args.kv.token(token);
      score = 0.0f;
      for (int32_t d = 0; d < args.head_dim; ++d) {
        score = fused_multiply_add(query[d], element<E>(key, d), score);
      }
      score *= args.scale;
      if (args.soft_cap > 0.0f) score = args.soft_cap * tanhf(score / args.soft_cap);
      score *= kLog2E;
    }
    float high = score;
    ELLM_UNROLL
    for (int32_t mask = kWarp / 2; mask > 0; mask /= 2) {
      high = fmaxf(high, shuffle_xor(high, mask));
    }
    const float before = max;
    max = fmaxf(max, high);
    const float base = max == kMinusInfinity ? 0.0f : max;
    const float keep = exp2_exact(before - base);
    const float weight = exp2_exact(score - base);
    sum = fused_multiply_add(sum, keep, weight);
    ELLM_UNROLL
    for (int32_t i = 0; i < kColumns; ++i) sums[i] *= keep;
    const int32_t last = at_most(kWarp - 1, position - block);
    for (int32_t j = at_least(0, begin - block); j <= last; ++j) {
      const float weight_j = shuffle(weight, j);
      const char* value = values + args.kv.token(block + j);
      ELLM_UNROLL
      for (int32_t i = 0; i < kColumns; ++i) {
        const int32_t d = lane + i * kWarp;
        if (d < args.head_dim) {
          sums[i] = fused_multiply_add(weight_j, element<E>(value, d), sums[i]);
        }
      }
    }
  }
  ELLM_UNROLL
  for (int32_t mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  char* out = static_cast<char*>(args.out) + offset;
  ELLM_UNROLL
  for (int32_t i = 0; i < kColumns; ++i) {
    const int32_t d = lane + i * kWarp;
    if (d < args.head_dim) set_element<E>(out, d, sums[i] / sum);
  }
}

inline int64_t exact_blocks(int64_t rows, int64_t q_heads) {
  return ceil_div(rows * q_heads, kExactThreads / kWarp);
}
constexpr int64_t kExactSharedBytes = kExactThreads / kWarp * kExactHeadDim * sizeof(float);

}  // namespace ellm::cuda
