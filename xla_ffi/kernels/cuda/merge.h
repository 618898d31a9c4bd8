// The parts of a long context as one result: in their order, whoever computed them and when.
#pragma once

#include "kernels/cuda/decode_task.h"

namespace ellm::cuda {

// Results of several parts of a row as one, in their order.
class Merged {
 public:
  float max = 0.0f;
  float sum = 0.0f;

  // `high`: the largest maximum; parts that saw nothing have minus infinity and weigh nothing.
  ELLM_DEVICE explicit Merged(float high) : max(high == kMinusInfinity ? 0.0f : high) {}

  // The weight of a part, whose sum is taken in.
  ELLM_DEVICE float take(const PartStats& part) {
    const float weight = exp2_fast(part.max - max);
    sum = fused_multiply_add(weight, part.sum, sum);
    return weight;
  }
};

// The parts of a row, first to last, to the rows of the output: by the block that is done last,
// with a warp for each query head.
template <class E, int32_t kHeadDim>
ELLM_DEVICE void merge_parts(const AttentionArgs& args, const DecodeTask& task) {
  // Pairs of columns that a lane holds.
  constexpr int32_t kPairs = static_cast<int32_t>(ceil_div(kHeadDim, 2 * kWarp));
  // Parts that are on their way at a time: as many as there are registers for beside the rest.
  constexpr int32_t kAhead = kHeadDim <= 128 ? 4 : 1;
  const Workspace& space = args.workspace;
  const int32_t lane = thread_index() % kWarp;
  for (int32_t row = thread_index() / kWarp; row < task.heads; row += kDecodeWarps) {
    const int32_t head = task.head + row;
    const int64_t first = int64_t{task.decode_row} * space.parts_capacity * args.q_heads + head;
    const auto stats = [&](int32_t part) {
      const FloatPair pair = load_from_others(space.stats + first + int64_t{part} * args.q_heads);
      return PartStats{pair.x, pair.y};
    };
    float high = kMinusInfinity;
    for (int32_t p = lane; p < task.parts; p += kWarp) high = fmaxf(high, stats(p).max);
    ELLM_UNROLL
    for (int32_t mask = kWarp / 2; mask > 0; mask /= 2) high = fmaxf(high, shuffle_xor(high, mask));

    Merged merged(high);
    float values[kPairs][2] = {};
    ELLM_NO_UNROLL
    for (int32_t p = 0; p < task.parts; p += kAhead) {
      PartStats part[kAhead];
      FloatPair from[kAhead][kPairs];
      ELLM_UNROLL
      for (int32_t a = 0; a < kAhead; ++a) {
        // Past the last part, or column, it is loaded again and not used.
        const int32_t at = at_most(p + a, task.parts - 1);
        part[a] = stats(at);
        const float* row_values =
            space.values + (first + int64_t{at} * args.q_heads) * args.head_dim;
        ELLM_UNROLL
        for (int32_t i = 0; i < kPairs; ++i) {
          const int32_t column = at_most(2 * (lane + i * kWarp), args.head_dim - 2);
          from[a][i] = load_from_others(row_values + column);
        }
      }
      ELLM_UNROLL
      for (int32_t a = 0; a < kAhead; ++a) {
        if (p + a >= task.parts) continue;
        const float weight = merged.take(part[a]);
        ELLM_UNROLL
        for (int32_t i = 0; i < kPairs; ++i) {
          values[i][0] = fused_multiply_add(weight, from[a][i].x, values[i][0]);
          values[i][1] = fused_multiply_add(weight, from[a][i].y, values[i][1]);
        }
      }
    }
    char* out = static_cast<char*>(args.out) +
                (int64_t{task.row} * args.q_heads + head) * args.kv.row_bytes;
    ELLM_UNROLL
    for (int32_t i = 0; i < kPairs; ++i) {
      const int32_t column = 2 * (lane + i * kWarp);
      if (column < args.head_dim) {
        *reinterpret_cast<uint32_t*>(out + column * 2) =
            E::pack(values[i][0] / merged.sum, values[i][1] / merged.sum);
      }
    }
  }
}

// Counts a part in; whether it is the last of its row and heads. One thread.
ELLM_DEVICE bool arrives_last(const AttentionArgs& args, const DecodeTask& task) {
  int32_t* arrivals = args.workspace.arrivals + task.decode_row * args.q_heads + task.head;
  return task.parts > 1 && arrive(arrivals) == task.parts - 1;
}

}  // namespace ellm::cuda
