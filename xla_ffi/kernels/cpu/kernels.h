// The CPU kernels as plain functions on pointers and shapes. Every instruction set
// provides one table of them; dispatch.h picks the table at run time.
//
// Contract of all kernels: a result row is reduced in one fixed order that depends on
// that row alone. What else is in the batch, how rows are blocked and how many threads
// run changes no bit of it.
#pragma once

#include <cstdint>

#include "kv/layout.h"
#include "kv/step.h"

namespace ellm {

enum class ElementType { kFloat32, kBFloat16 };

inline int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// What a linear layer makes of its products before it stores them, where w is in panels and out is
// bfloat16. Each step rounds to bfloat16, so the result is that of the steps one by one.
struct Finish {
  const uint16_t* bias = nullptr;  // [n], added to each row
  const uint16_t* add = nullptr;   // [rows, n], added then
  // Each panel of outputs is half gates, half ups, n a multiple of a panel: out is [rows, n / 2],
  // silu(gate) * up. No `add` then.
  bool gated = false;
};

// out[m, n] = sum_k x[m, k] * w[n, k], accumulated in float32.
struct LinearArgs {
  // [rows, x_stride] float32, zero beyond k up to x_stride, a multiple of Kernels::lanes. Or, where
  // Kernels::bf16_pairs and w is bfloat16, [rows, k] bfloat16, dense; x_stride is k.
  const void* x;
  ElementType x_type;
  int64_t x_stride;
  const void* w;  // [n, k] of w_type, dense
  ElementType w_type;
  void* out;  // [rows, n] of out_type, dense
  ElementType out_type;
  int64_t rows;
  int64_t n;
  int64_t k;
  Finish finish;
};

// Columns [begin, end) of a result. The same thread goes on with [end, ahead), so their weights are
// asked for beside the products; those of the first block of [begin, end) were before, if `asked`.
struct Columns {
  int64_t begin;
  int64_t end;
  int64_t ahead;
  bool asked;
};

// Attention of a ragged batch over the KV slots of one layer.
struct AttentionArgs {
  const void* q;  // [rows, q_heads, head_dim]
  void* out;      // like q
  ElementType type;
  int64_t q_heads;
  KvLayout kv;    // kv heads, head_dim and where the K and V of a token lie, of `type` or int8
  char* kv_base;  // slot 0; slot s starts s * kv.slot_bytes further on
  int64_t layer;
  int64_t window;  // a token sees the last `window` tokens, itself included; 0: all
  float scale;
  float soft_cap;       // cap * tanh(score / cap); 0: none
  int64_t part_tokens;  // the online softmax starts afresh every part_tokens
};

// Rows [token_begin, token_end) of a sequence with some of the KV heads, over the parts
// [part_begin, part_end) of its context.
struct AttentionUnit {
  SequenceSpan span;
  int64_t head_begin;  // KV heads
  int64_t head_end;
  int64_t token_begin;  // relative to the span
  int64_t token_end;
  int64_t part_begin;
  int64_t part_end;
};

// Online-softmax state of `rows` query rows, by KV head, token and query head of the group: maximum
// (to the base 2), sum, and the weighted V, unnormalised.
struct SoftmaxState {
  float* max;  // [rows]
  float* sum;  // [rows]
  float* acc;  // [rows, acc_stride]
};

// Most elements of a head that `heads` takes.
constexpr int64_t kMaxHeadDim = 1024;

// Rows of fused projections, and where their heads go.
struct HeadsArgs {
  ElementType type;
  const void* qkv;     // [rows, (q_heads + 2 * kv_heads) * head_dim]
  const float* cos;    // [rows, head_dim / 2]
  const float* sin;    // like cos
  const void* q_norm;  // [head_dim]; null: the heads are not normalised
  const void* k_norm;  // like q_norm
  float eps;           // of both norms
  void* q;             // [rows, q_heads, head_dim]
  void* k;             // [rows, kv_heads, head_dim]
  void* v;             // like k
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;  // even
};

struct Kernels {
  const char* isa;
  int64_t lanes;    // float32 lanes of a vector
  bool bf16_pairs;  // products of two bfloat16 are taken as they are, not widened

  // Converts [rows, k] of `type` to float32 rows of `x_stride` floats, zero padded.
  void (*to_float)(const void* x, ElementType type, int64_t rows, int64_t k, int64_t x_stride,
                   float* out);
  void (*linear)(const LinearArgs& args, const Columns& columns);
  // The same with w in panels (panels.h) of bfloat16, columns that begin at panels, and x dense:
  // float32, or bfloat16 where bf16_pairs.
  void (*linear_panels)(const LinearArgs& args, const Columns& columns);
  // Floats of scratch that `attend` needs for a unit of `rows` = KV heads * tokens * group.
  int64_t (*attend_scratch_floats)(const AttentionArgs& args, int64_t rows);
  // Attends `unit`. With `partial` null the result goes to args.out; otherwise the state of each
  // part goes to partial[part - part_begin] and nothing is written to args.out.
  void (*attend)(const AttentionArgs& args, const AttentionUnit& unit, float* scratch,
                 const SoftmaxState* partial);
  // Merges the states of consecutive parts, first to last, and writes the unit's rows to args.out.
  void (*merge)(const AttentionArgs& args, const AttentionUnit& unit, const SoftmaxState* partial,
                float* scratch);
  // Floats between rows of SoftmaxState::acc.
  int64_t (*acc_stride)(int64_t head_dim);

  // out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * scale; rows of n elements, all of `type`.
  void (*rms_norm)(const void* x, const void* scale, void* out, ElementType type, int64_t rows,
                   int64_t n, float eps);
  // Parts the heads of rows [row_begin, row_end) of fused projections; those of q and k are
  // normalised where there are norms, and rotated.
  void (*heads)(const HeadsArgs& args, int64_t row_begin, int64_t row_end);
  // out[r, i] = silu(x[r, i]) * x[r, n + i]; x has rows of 2 n elements, out of n, all of `type`.
  void (*silu_mul)(const void* x, void* out, ElementType type, int64_t rows, int64_t n);
  // Index of the largest of n scores, the lowest among equals; -1 where one is NaN.
  int64_t (*likeliest)(const float* x, int64_t n);
};

}  // namespace ellm
