// Attention of single rows over long contexts, at the speed of memory: each block takes a part of
// one row's context with one KV head, and each of its warps every fourth group of 16 tokens of it.
#pragma once

#include "kernels/cuda/merge.h"

namespace ellm::cuda {

// What the first thread tells the others between two units.
struct DecodeNotes {
  int32_t next;   // unit
  int32_t merge;  // whether the unit was the last of its row and heads
};

// Shared memory: the queries; per warp a ring of steps, each K and V; what the warps tell each
// other.
template <int32_t kHeadDim>
struct DecodeMemory {
  static constexpr int32_t kPitch = pitch_bytes(kHeadDim);
  // Enough bytes on their way for one block, and two blocks fit a multiprocessor of an H100.
  static constexpr int32_t kStages = kHeadDim <= 64 ? 4 : kHeadDim <= 128 ? 3 : 2;
  static constexpr int32_t kStepBytes = kDecodeStep * kPitch;
  static constexpr int32_t kQueryBytes = kDecodeRows * kPitch;
  static constexpr int32_t kRing = kQueryBytes;
  static constexpr int32_t kWarpRingBytes = kStages * 2 * kStepBytes;
  static constexpr int32_t kNotes = kRing + kDecodeWarps * kWarpRingBytes;
  static constexpr int32_t kBytes = kNotes + 16;
  static_assert(sizeof(DecodeNotes) <= kBytes - kNotes);

  // After the last step the rings hold the results of the warps instead: per row its maximum, its
  // sum, and kHeadDim values.
  static constexpr int32_t kResultFloats = kHeadDim + 4;
  static_assert(kDecodeRows * kResultFloats * int32_t{sizeof(float)} <= kWarpRingBytes);
};

// Starts the copies of K and V of the tokens [token, token + kDecodeStep) by one warp. Tokens from
// `end` on become zeros, and so do columns past the head: where their memory may not be mapped,
// they have the addresses of others.
template <int32_t kHeadDim>
ELLM_DEVICE void load_step(const AttentionArgs& args, const DecodeTask& task, int32_t token,
                           char* stage) {
  using Memory = DecodeMemory<kHeadDim>;
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  const int32_t lane = thread_index() % kWarp;
  ELLM_UNROLL
  for (int32_t half = 0; half < kDecodeStep / 8; ++half) {
    const int32_t first = token + 8 * half;
    const int64_t from = args.kv.token_or_first(first, first < task.end);
    ELLM_UNROLL
    for (int32_t i = 0; i < 8 * kVectors / kWarp; ++i) {
      const int32_t row = (i * kWarp + lane) / kVectors;
      const int32_t column = (i * kWarp + lane) % kVectors;
      const bool valid = first + row < task.end && column * kVectorElements < args.head_dim;
      const int64_t offset = from + args.kv.within_eight(row, column * kVectorBytes);
      char* to = stage + (8 * half + row) * Memory::kPitch + column * kVectorBytes;
      copy_async(to, task.keys + offset, valid);
      copy_async(to + Memory::kStepBytes, task.values + offset, valid);
    }
  }
}

template <int32_t kHeadDim>
ELLM_DEVICE void load_queries(const AttentionArgs& args, const DecodeTask& task, char* queries) {
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  const char* from = static_cast<const char*>(args.q) +
                     (int64_t{task.row} * args.q_heads + task.head) * args.kv.row_bytes;
  for (int32_t i = thread_index(); i < kDecodeRows * kVectors; i += kDecodeThreads) {
    const int32_t row = i / kVectors;
    const int32_t column = i % kVectors;
    const bool valid = row < task.heads && column * kVectorElements < args.head_dim;
    copy_async(queries + row * pitch_bytes(kHeadDim) + column * kVectorBytes,
               from + (valid ? row * args.kv.row_bytes + column * kVectorBytes : int64_t{0}),
               valid);
  }
}

// One warp takes in a step that lies in shared memory.
template <class E, int32_t kHeadDim>
ELLM_DEVICE void take_step(const DecodeTask& task, const ScoreScale& scale, int32_t token,
                           const char* queries, const char* stage, RowState* state,
                           float (&values)[kHeadDim / 8][4]) {
  using Memory = DecodeMemory<kHeadDim>;
  float scores[kDecodeStep / 8][4] = {};
  ELLM_UNROLL
  for (int32_t column = 0; column < kHeadDim; column += 16) {
    uint32_t q[4];
    uint32_t k[4];
    load_left<Memory::kPitch>(q, queries, 0, column);
    load_keys<Memory::kPitch>(k, stage, 0, column);
    E::multiply_add(scores[0], q, k[0], k[1]);
    E::multiply_add(scores[1], q, k[2], k[3]);
  }
  cap_scores(scores, scale);
  if (token < task.begin || token + kDecodeStep > task.end) {
    const int32_t begin = task.begin - token;
    const int32_t end = task.end - token;
    mask_scores(scores, Visible{{begin, begin}, {end, end}});
  }
  float keep[2];
  state->weigh(scores, scale.factor, keep);
  rescale(values, keep);
  uint32_t weights[4];
  pack_weights<E>(weights, scores, 0);
  ELLM_UNROLL
  for (int32_t column = 0; column < kHeadDim; column += 16) {
    uint32_t v[4];
    load_values<Memory::kPitch>(v, stage + Memory::kStepBytes, 0, column);
    E::multiply_add(values[column / 8], weights, v[0], v[1]);
    E::multiply_add(values[column / 8 + 1], weights, v[2], v[3]);
  }
}

// A warp's rows to its part of the shared memory.
template <int32_t kHeadDim>
ELLM_DEVICE void store_result(const RowState& state, float factor,
                              const float (&values)[kHeadDim / 8][4], float* results) {
  using Memory = DecodeMemory<kHeadDim>;
  const int32_t lane = thread_index() % kWarp;
  ELLM_UNROLL
  for (int32_t r = 0; r < 2; ++r) {
    const float total = state.total(r);
    float* to = results + (lane / 4 + 8 * r) * Memory::kResultFloats;
    if (lane % 4 == 0) {
      to[0] = state.max[r] * factor;
      to[1] = total;
    }
    ELLM_UNROLL
    for (int32_t j = 0; j < kHeadDim / 8; ++j) {
      to[4 + 8 * j + lane % 4 * 2] = values[j][2 * r];
      to[4 + 8 * j + lane % 4 * 2 + 1] = values[j][2 * r + 1];
    }
  }
}

// The results of the warps as one, to the partial results or, where the row has one part, to the
// rows of the output. The whole block.
template <class E, int32_t kHeadDim>
ELLM_DEVICE void merge_warps(const AttentionArgs& args, const DecodeTask& task, const char* rings) {
  using Memory = DecodeMemory<kHeadDim>;
  const Workspace& space = args.workspace;
  const int32_t lane = thread_index() % kWarp;
  const auto result = [&](int32_t warp, int32_t row) {
    return reinterpret_cast<const float*>(rings + warp * Memory::kWarpRingBytes) +
           row * Memory::kResultFloats;
  };
  for (int32_t row = thread_index() / kWarp; row < task.heads; row += kDecodeWarps) {
    float high = kMinusInfinity;
    for (int32_t w = 0; w < kDecodeWarps; ++w) high = fmaxf(high, result(w, row)[0]);
    Merged merged(high);
    float weights[kDecodeWarps];
    ELLM_UNROLL
    for (int32_t w = 0; w < kDecodeWarps; ++w) {
      weights[w] = merged.take({result(w, row)[0], result(w, row)[1]});
    }
    const int32_t head = task.head + row;
    const int64_t part =
        (int64_t{task.decode_row} * space.parts_capacity + task.part) * args.q_heads + head;
    if (task.parts > 1 && lane == 0) space.stats[part] = {merged.max, merged.sum};
    char* out = static_cast<char*>(args.out) +
                (int64_t{task.row} * args.q_heads + head) * args.kv.row_bytes;
    for (int32_t column = 2 * lane; column < args.head_dim; column += 2 * kWarp) {
      float pair[2] = {0.0f, 0.0f};
      ELLM_UNROLL
      for (int32_t w = 0; w < kDecodeWarps; ++w) {
        pair[0] = fused_multiply_add(weights[w], result(w, row)[4 + column], pair[0]);
        pair[1] = fused_multiply_add(weights[w], result(w, row)[5 + column], pair[1]);
      }
      if (task.parts > 1) {
        float* to = space.values + part * args.head_dim + column;
        to[0] = pair[0];
        to[1] = pair[1];
      } else {
        *reinterpret_cast<uint32_t*>(out + column * 2) =
            E::pack(pair[0] / merged.sum, pair[1] / merged.sum);
      }
    }
  }
}

template <class E, int32_t kHeadDim>
ELLM_DEVICE void decode_part(const AttentionArgs& args, const DecodeTask& task, char* shared) {
  using Memory = DecodeMemory<kHeadDim>;
  const ScoreScale scale(args);
  const int32_t warp = thread_index() / kWarp;
  char* ring = shared + Memory::kRing + warp * Memory::kWarpRingBytes;
  const auto stage = [&](int32_t i) { return ring + i % Memory::kStages * 2 * Memory::kStepBytes; };

  // Steps at absolute multiples of 16 tokens; which warp takes one is a function of the token too.
  constexpr int32_t kStride = kDecodeWarps * kDecodeStep;
  int32_t first = task.begin / kStride * kStride + warp * kDecodeStep;
  if (first + kDecodeStep <= task.begin) first += kStride;
  const int32_t steps =
      first < task.end ? static_cast<int32_t>(ceil_div(task.end - first, kStride)) : 0;

  load_queries<kHeadDim>(args, task, shared);
  commit_copies();
  ELLM_UNROLL
  for (int32_t i = 0; i < Memory::kStages - 1; ++i) {
    if (i < steps) load_step<kHeadDim>(args, task, first + i * kStride, stage(i));
    commit_copies();
  }
  wait_copies<Memory::kStages - 1>();
  sync_block();  // the queries, copied by all warps

  RowState state;
  state.reset();
  float values[kHeadDim / 8][4] = {};
  ELLM_NO_UNROLL
  for (int32_t i = 0; i < steps; ++i) {
    wait_copies<Memory::kStages - 2>();
    sync_warp();  // the copies of the other lanes too; and all have left the stage to be filled
    const int32_t ahead = i + Memory::kStages - 1;
    if (ahead < steps) load_step<kHeadDim>(args, task, first + ahead * kStride, stage(ahead));
    commit_copies();
    take_step<E, kHeadDim>(task, scale, first + i * kStride, shared, stage(i), &state, values);
  }
  wait_copies<0>();
  sync_warp();
  store_result<kHeadDim>(state, scale.factor, values, reinterpret_cast<float*>(ring));
  sync_block();
  merge_warps<E, kHeadDim>(args, task, shared + Memory::kRing);
}

// A fixed number of blocks, each of which takes unit after unit. Whoever is done last with the
// parts of a row merges them.
template <class E, int32_t kHeadDim>
ELLM_KERNEL void ELLM_LAUNCH_BOUNDS(kDecodeThreads, kHeadDim <= 128 ? 2 : 1)
    decode(const AttentionArgs args) {
  using Memory = DecodeMemory<kHeadDim>;
  char* shared = shared_memory();
  auto* notes = reinterpret_cast<DecodeNotes*>(shared + Memory::kNotes);
  WorkHeader* header = args.workspace.header;
  const int32_t units = header->decode_units * args.kv.kv_heads * head_blocks(args.group.value());
  int32_t unit = block_index();
  while (unit < units) {
    // Asked for early and used late, so that nothing waits for the answer; but the largest heads
    // leave no register to keep it in.
    constexpr bool kEarly = kHeadDim <= 128;
    int32_t next = 0;
    if (kEarly && thread_index() == 0) next = grid_blocks() + take(&header->decode_taken);
    const DecodeTask task = decode_task(args, unit);
    decode_part<E, kHeadDim>(args, task, shared);
    sync_block();
    if (thread_index() == 0) {
      if (!kEarly) next = grid_blocks() + take(&header->decode_taken);
      *notes = {next, arrives_last(args, task) ? 1 : 0};
    }
    sync_block();
    unit = notes->next;
    if (notes->merge != 0) merge_parts<E, kHeadDim>(args, task);
  }
}

}  // namespace ellm::cuda
