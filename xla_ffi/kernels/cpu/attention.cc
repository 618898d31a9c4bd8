#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/attention_plan.h"
#include "kernels/cpu/int8_kernels.h"
#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {

// Bytes of K and V below which a copy is not worth handing out.
constexpr int64_t kSerialCopyBytes = 256 * 1024;

// Floats of partial states below which merging them is not worth handing out.
constexpr int64_t kSerialMergeFloats = 64 * 1024;

}  // namespace

void write_kv(const AttentionArgs& a, const void* k, const void* v, const SequenceSpan* spans,
              int64_t num_spans, const ParallelFor& parallel) {
  const int64_t row_bytes = a.kv.head_dim * element_bytes(a.type);
  const void* const sides[] = {k, v};
  int64_t rows = 0;
  for (int64_t s = 0; s < num_spans; ++s) rows += spans[s].row_count;
  const auto write_row = [&](char* slot, int64_t side, int64_t head, int64_t token,
                             const char* from) {
    char* to = slot + a.kv.offset_bytes(a.layer, side, head, token);
    if (a.kv.scale_bytes == 0) {
      std::memcpy(to, from, row_bytes);
      return;
    }
    char* scale = slot + a.kv.scale_offset_bytes(a.layer, side, head, token);
    int8_kernels().quantize(
        from, a.type, 1, a.kv.head_dim,
        {reinterpret_cast<int8_t*>(to), a.kv.head_dim, reinterpret_cast<float*>(scale), nullptr});
  };
  const auto write = [&](int64_t s) {
    const SequenceSpan& span = spans[s];
    for (int64_t t = 0; t < span.row_count; ++t) {
      char* slot = a.kv_base + span.slot * a.kv.slot_bytes;
      const int64_t token = span.context_tokens + t;
      const int64_t from = (span.row_begin + t) * a.kv.kv_heads * row_bytes;
      for (int64_t h = 0; h < a.kv.kv_heads; ++h) {
        for (int64_t side = 0; side < 2; ++side) {
          write_row(slot, side, h, token,
                    static_cast<const char*>(sides[side]) + from + h * row_bytes);
        }
      }
    }
  };
  if (rows * 2 * a.kv.kv_heads * row_bytes <= kSerialCopyBytes) {
    run_serially(num_spans, write);
  } else {
    parallel(num_spans, write);
  }
}

void attention(const Kernels& kernels, const AttentionArgs& a, const SequenceSpan* spans,
               int64_t num_spans, int64_t num_threads, const ParallelFor& parallel,
               WorkspaceSource* workspaces) {
  const AttentionPlanner planner(a, spans, num_spans, num_threads);
  const AttentionPlan plan = planner.plan();
  int64_t state_rows = 0;
  for (const auto& piece : plan.pieces)
    state_rows = std::max(state_rows, planner.rows_of(piece.unit));
  const int64_t stride = kernels.acc_stride(a.kv.head_dim);
  const int64_t state_floats = state_rows * (stride + 2);
  const WorkspaceMemory memory(workspaces, plan.num_states * state_floats * sizeof(float));
  std::vector<SoftmaxState> states(plan.num_states);
  for (int64_t i = 0; i < plan.num_states; ++i) {
    float* at = static_cast<float*>(memory.get()) + i * state_floats;
    states[i] = {at + state_rows * stride, at + state_rows * (stride + 1), at};
  }

  const int64_t scratch_floats = kernels.attend_scratch_floats(a, plan.unit_rows);
  const int64_t num_pieces = static_cast<int64_t>(plan.pieces.size());
  const int64_t num_whole = static_cast<int64_t>(plan.whole.size());
  // Blocks late in a prompt see most tokens: taken first, they leave short ones for the end.
  parallel(num_pieces + num_whole, [&](int64_t i) {
    float* scratch = Scratch::floats(scratch_floats);
    if (i < num_pieces) {
      kernels.attend(a, plan.pieces[i].unit, scratch, &states[plan.pieces[i].state]);
    } else {
      kernels.attend(a, plan.whole[num_whole - 1 - (i - num_pieces)], scratch, nullptr);
    }
  });
  const auto merge = [&](int64_t i) {
    kernels.merge(a, plan.divided[i].unit, states.data() + plan.divided[i].state,
                  Scratch::floats(scratch_floats));
  };
  const int64_t num_divided = static_cast<int64_t>(plan.divided.size());
  if (plan.num_states * state_floats <= kSerialMergeFloats) {
    run_serially(num_divided, merge);
  } else {
    parallel(num_divided, merge);
  }
}

}  // namespace ellm
