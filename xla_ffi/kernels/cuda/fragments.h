// Tiles of 2-byte elements in shared memory as fragments of tensor core products, and the online
// softmax of the 16 query rows that a warp holds in fragments.
#pragma once

#include <limits>

#include "kernels/cuda/attention_args.h"
#include "kernels/cuda/device.h"

namespace ellm::cuda {

constexpr float kLog2E = 1.44269504088896341f;
constexpr int32_t kWarp = 32;
constexpr int32_t kVectorBytes = 16;
constexpr int32_t kVectorElements = 8;

// Bytes from one row of a tile to the next: 16 more than it holds, so that the eight rows of a
// matrix start in eight different groups of banks (head sizes are multiples of 32).
ELLM_HOST_DEVICE constexpr int32_t pitch_bytes(int32_t head_dim) {
  return head_dim * 2 + kVectorBytes;
}

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Rows [row, row + 16) and columns [column, column + 16) of a tile, as the left operand.
template <int32_t kPitch>
ELLM_DEVICE void load_left(uint32_t (&to)[4], const char* tile, int32_t row, int32_t column) {
  const int32_t lane = thread_index() % kWarp;
  load_matrices(to, tile + (row + lane % 16) * kPitch + (column + lane / 16 * 8) * 2);
}

// Tokens [token, token + 16) of K, columns [column, column + 16), as the right operands of q . k:
// two of 8 tokens each.
template <int32_t kPitch>
ELLM_DEVICE void load_keys(uint32_t (&to)[4], const char* tile, int32_t token, int32_t column) {
  const int32_t lane = thread_index() % kWarp;
  load_matrices(
      to, tile + (token + lane / 16 * 8 + lane % 8) * kPitch + (column + lane / 8 % 2 * 8) * 2);
}

// Tokens [token, token + 16) of V, columns [column, column + 16), as the right operands of
// weights . v: two of 8 columns each.
template <int32_t kPitch>
ELLM_DEVICE void load_values(uint32_t (&to)[4], const char* tile, int32_t token, int32_t column) {
  const int32_t lane = thread_index() % kWarp;
  load_matrices_transposed(to, tile + (token + lane % 16) * kPitch + (column + lane / 16 * 8) * 2);
}

// How raw scores become exponents to the base 2.
struct ScoreScale {
  float factor;    // of what `cap` returns
  float soft_cap;  // cap * log2(e); 0: none
  float inner;     // scale / cap

  ELLM_DEVICE explicit ScoreScale(const AttentionArgs& args)
      : factor(args.soft_cap > 0.0f ? 1.0f : args.scale * kLog2E),
        soft_cap(args.soft_cap * kLog2E),
        inner(args.soft_cap > 0.0f ? 2.0f * kLog2E * args.scale / args.soft_cap : 0.0f) {}

  // tanh(x) = 1 - 2 / (exp(2 x) + 1)
  ELLM_DEVICE float cap(float score) const {
    const float e = exp2_fast(score * inner);
    return soft_cap - divide_fast(2.0f * soft_cap, e + 1.0f);
  }
};

// The tokens that each of the two rows of a lane sees, relative to the first token of a tile.
struct Visible {
  int32_t begin[2];
  int32_t end[2];
};

// Scores of 16 rows and 8 kTiles tokens: in a lane, those of rows lane / 4 ([0], [1]) and
// lane / 4 + 8 ([2], [3]) and of tokens 2 (lane % 4) and the next.
template <int32_t kTiles>
using Scores = float[kTiles][4];

template <int32_t kTiles>
ELLM_DEVICE void cap_scores(Scores<kTiles>& scores, const ScoreScale& scale) {
  if (scale.soft_cap == 0.0f) return;
  ELLM_UNROLL
  for (int32_t j = 0; j < kTiles; ++j) {
    ELLM_UNROLL
    for (int32_t i = 0; i < 4; ++i) scores[j][i] = scale.cap(scores[j][i]);
  }
}

template <int32_t kTiles>
ELLM_DEVICE void mask_scores(Scores<kTiles>& scores, const Visible& visible) {
  const int32_t first = thread_index() % 4 * 2;
  ELLM_UNROLL
  for (int32_t j = 0; j < kTiles; ++j) {
    ELLM_UNROLL
    for (int32_t i = 0; i < 4; ++i) {
      const int32_t token = 8 * j + first + i % 2;
      const int32_t row = i / 2;
      if (token < visible.begin[row] || token >= visible.end[row]) {
        scores[j][i] = kMinusInfinity;
      }
    }
  }
}

// Online softmax of 16 rows: running maximum of the raw scores, and this lane's share of the sums.
struct RowState {
  float max[2];
  float sum[2];

  ELLM_DEVICE void reset() {
    ELLM_UNROLL
    for (int32_t r = 0; r < 2; ++r) {
      max[r] = kMinusInfinity;
      sum[r] = 0.0f;
    }
  }

  // What exponents are taken relative to: finite even for a row that has seen nothing.
  ELLM_DEVICE float reference(int32_t r, float factor) const {
    return max[r] == kMinusInfinity ? 0.0f : max[r] * factor;
  }

  // Takes in the scores of the next tokens: turns them into weights relative to the new maximum,
  // and says by what the values accumulated so far have to be multiplied.
  template <int32_t kTiles>
  ELLM_DEVICE void weigh(Scores<kTiles>& scores, float factor, float (&keep)[2]) {
    ELLM_UNROLL
    for (int32_t r = 0; r < 2; ++r) {
      float high = scores[0][2 * r];
      ELLM_UNROLL
      for (int32_t j = 0; j < kTiles; ++j) {
        high = fmaxf(high, fmaxf(scores[j][2 * r], scores[j][2 * r + 1]));
      }
      high = fmaxf(high, shuffle_xor(high, 1));
      high = fmaxf(high, shuffle_xor(high, 2));
      const float before = max[r] * factor;
      max[r] = fmaxf(max[r], high);
      const float base = reference(r, factor);
      keep[r] = exp2_fast(before - base);
      float added = 0.0f;
      ELLM_UNROLL
      for (int32_t j = 0; j < kTiles; ++j) {
        ELLM_UNROLL
        for (int32_t i = 0; i < 2; ++i) {
          const float weight = exp2_fast(fused_multiply_add(scores[j][2 * r + i], factor, -base));
          scores[j][2 * r + i] = weight;
          added += weight;
        }
      }
      sum[r] = fused_multiply_add(sum[r], keep[r], added);
    }
  }

  // The sum of a row over the four lanes that share it.
  ELLM_DEVICE float total(int32_t r) const {
    float all = sum[r];
    all += shuffle_xor(all, 1);
    all += shuffle_xor(all, 2);
    return all;
  }
};

// Weights of 16 tokens, from token 16 `step` of the scores on, as the left operand.
template <class E, int32_t kTiles>
ELLM_DEVICE void pack_weights(uint32_t (&to)[4], const Scores<kTiles>& weights, int32_t step) {
  to[0] = E::pack(weights[2 * step][0], weights[2 * step][1]);
  to[1] = E::pack(weights[2 * step][2], weights[2 * step][3]);
  to[2] = E::pack(weights[2 * step + 1][0], weights[2 * step + 1][1]);
  to[3] = E::pack(weights[2 * step + 1][2], weights[2 * step + 1][3]);
}

// Multiplies accumulated values by what RowState::weigh says. Multiplying by 1 changes no bit, so
// it is left out where no row of the warp has a new maximum.
template <int32_t kTiles>
ELLM_DEVICE void rescale(float (&values)[kTiles][4], const float (&keep)[2]) {
  if (ballot(keep[0] != 1.0f || keep[1] != 1.0f) == 0) return;
  ELLM_UNROLL
  for (int32_t j = 0; j < kTiles; ++j) {
    values[j][0] *= keep[0];
    values[j][1] *= keep[0];
    values[j][2] *= keep[1];
    values[j][3] *= keep[1];
  }
}

}  // namespace ellm::cuda
