// Attention of many tokens of a sequence on the tensor cores of sm_80 and later: a block takes 128
// query rows (tokens times the query heads of one KV head) and goes through the context in tiles of
// tokens, with an online softmax; after Dao, "FlashAttention-2" (2023).
#pragma once

#include "kernels/cuda/prepare.h"

namespace ellm::cuda {

// Shared memory: the queries, a tile of K, a tile of V. K of the next tile is loaded while the
// weights are computed and multiplied with V, V while the scores are computed.
template <int32_t kHeadDim>
struct PrefillMemory {
  static constexpr int32_t kPitch = pitch_bytes(kHeadDim);
  // Tokens: as many as leave registers for the scores beside the values.
  static constexpr int32_t kTile = kHeadDim <= 96 ? 64 : 32;
  // 16-row products per warp: two share each load of K and V, unless the values would not fit the
  // registers.
  static constexpr int32_t kRowTiles = kHeadDim <= 128 ? 2 : 1;
  static constexpr int32_t kWarps = kPrefillRows / 16 / kRowTiles;
  static constexpr int32_t kThreads = kWarps * kWarp;
  static constexpr int32_t kKeys = kPrefillRows * kPitch;
  static constexpr int32_t kValues = kKeys + kTile * kPitch;
  static constexpr int32_t kNotes = kValues + kTile * kPitch;
  static constexpr int32_t kBytes = kNotes + 16;
};

// What a block works on.
struct PrefillTask {
  int32_t row;  // of q: that of the first token
  int32_t kv_head;
  int32_t query_rows;      // in use of kPrefillRows
  int32_t first_position;  // of the first token
  int32_t last_position;
  const char* keys;
  const char* values;
};

// One KV head comes after the other: then the K and V that all blocks read at a time stay in the L2
// cache.
ELLM_DEVICE PrefillTask prefill_task(const AttentionArgs& args, int32_t index) {
  const int32_t units = args.workspace.header->prefill_units;
  const int32_t kv_head = index / units;
  const PrefillUnit unit = args.workspace.prefill_units[index - kv_head * units];
  const SequenceSpan span = args.step.span(unit.span);
  const int32_t layer = args.layer[0];
  const int32_t block_tokens = tokens_per_block(kPrefillRows, args.group.value());
  const int32_t first = unit.block * block_tokens;
  const int32_t tokens = at_most(block_tokens, span.row_count - first);

  PrefillTask task;
  task.row = span.row_begin + first;
  task.kv_head = kv_head;
  task.query_rows = tokens * args.group.value();
  task.first_position = span.context_tokens + first;
  task.last_position = task.first_position + tokens - 1;
  task.keys = args.kv.head(span.slot, layer, 0, task.kv_head);
  task.values = args.kv.head(span.slot, layer, 1, task.kv_head);
  return task;
}

// Bytes from q (or the result) to query row `row` of the task: rows are tokens, then heads.
ELLM_DEVICE int64_t query_offset(const AttentionArgs& args, const PrefillTask& task, int32_t row) {
  const int32_t token = args.group.quotient(row);
  const int32_t head = task.kv_head * args.group.value() + row - token * args.group.value();
  return ((int64_t{task.row} + token) * args.q_heads + head) * args.kv.row_bytes;
}

// Starts the copies of one tile of K or V by the whole block. Tokens past the last position
// become zeros, and so do columns past the head: where their memory may not be mapped, they have
// the addresses of others.
template <int32_t kHeadDim>
ELLM_DEVICE void load_tile(const AttentionArgs& args, const char* head, int32_t tile,
                           int32_t last_position, char* to) {
  using Memory = PrefillMemory<kHeadDim>;
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  // Threads that copy one group of eight tokens, whose memory is contiguous.
  constexpr int32_t kGroupThreads = Memory::kThreads / (Memory::kTile / 8);
  const int32_t group = thread_index() / kGroupThreads;
  const int32_t token = tile * Memory::kTile + 8 * group;
  const int64_t from = args.kv.token_or_first(token, token <= last_position);
  ELLM_UNROLL
  for (int32_t i = 0; i < 8 * kVectors / kGroupThreads; ++i) {
    const int32_t row = (i * kGroupThreads + thread_index() % kGroupThreads) / kVectors;
    const int32_t column = (i * kGroupThreads + thread_index() % kGroupThreads) % kVectors;
    copy_async(to + (8 * group + row) * pitch_bytes(kHeadDim) + column * kVectorBytes,
               head + from + args.kv.within_eight(row, column * kVectorBytes),
               token + row <= last_position && column * kVectorElements < args.head_dim);
  }
}

template <int32_t kHeadDim, int32_t kThreads>
ELLM_DEVICE void load_block_queries(const AttentionArgs& args, const PrefillTask& task,
                                    char* queries) {
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  for (int32_t i = thread_index(); i < kPrefillRows * kVectors; i += kThreads) {
    const int32_t row = i / kVectors;
    const int32_t column = i % kVectors;
    const bool valid = row < task.query_rows && column * kVectorElements < args.head_dim;
    copy_async(queries + row * pitch_bytes(kHeadDim) + column * kVectorBytes,
               static_cast<const char*>(args.q) + query_offset(args, task, valid ? row : 0) +
                   (valid ? column * kVectorBytes : 0),
               valid);
  }
}

// The tokens that rows `row` and `row + 8` of the task see, relative to `token`.
ELLM_DEVICE Visible visible_to(const AttentionArgs& args, const PrefillTask& task, int32_t window,
                               int32_t row, int32_t token) {
  Visible visible;
  ELLM_UNROLL
  for (int32_t r = 0; r < 2; ++r) {
    const int32_t position = task.first_position + args.group.quotient(row + 8 * r);
    visible.begin[r] = first_seen(position, window) - token;
    visible.end[r] = position + 1 - token;
  }
  return visible;
}

// Writes 16 rows of a warp, divided by their sums, over its own rows of the queries, and from there
// to the result.
template <class E, int32_t kHeadDim>
ELLM_DEVICE void store_rows(const AttentionArgs& args, const PrefillTask& task,
                            const RowState& state, const float (&values)[kHeadDim / 8][4],
                            int32_t first_row, char* queries) {
  constexpr int32_t kPitch = pitch_bytes(kHeadDim);
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  const int32_t lane = thread_index() % kWarp;
  char* rows = queries + first_row * kPitch;
  ELLM_UNROLL
  for (int32_t r = 0; r < 2; ++r) {
    const float share = 1.0f / state.total(r);
    ELLM_UNROLL
    for (int32_t j = 0; j < kHeadDim / 8; ++j) {
      *reinterpret_cast<uint32_t*>(rows + (lane / 4 + 8 * r) * kPitch + 16 * j + lane % 4 * 4) =
          E::pack(values[j][2 * r] * share, values[j][2 * r + 1] * share);
    }
  }
  sync_warp();
  for (int32_t i = lane; i < 16 * kVectors; i += kWarp) {
    const int32_t row = i / kVectors;
    const int32_t column = i % kVectors;
    if (first_row + row < task.query_rows && column * kVectorElements < args.head_dim) {
      *reinterpret_cast<Bytes16*>(static_cast<char*>(args.out) +
                                  query_offset(args, task, first_row + row) +
                                  column * kVectorBytes) =
          *reinterpret_cast<const Bytes16*>(rows + row * kPitch + column * kVectorBytes);
    }
  }
}

template <class E, int32_t kHeadDim>
ELLM_DEVICE void prefill_block(const AttentionArgs& args, const PrefillTask& task, char* shared) {
  using Memory = PrefillMemory<kHeadDim>;
  constexpr int32_t kRowTiles = Memory::kRowTiles;
  const ScoreScale scale(args);
  const int32_t window = args.window[0];
  const int32_t first_row = thread_index() / kWarp * 16 * kRowTiles;
  const int32_t lane_row = first_row + thread_index() % kWarp / 4;
  char* keys = shared + Memory::kKeys;
  char* values = shared + Memory::kValues;
  const TileRange tiles = tiles_of(task.first_position, task.last_position, window, Memory::kTile);

  RowState state[kRowTiles];
  float sums[kRowTiles][kHeadDim / 8][4] = {};
  ELLM_UNROLL
  for (int32_t m = 0; m < kRowTiles; ++m) state[m].reset();

  load_block_queries<kHeadDim, Memory::kThreads>(args, task, shared);
  load_tile<kHeadDim>(args, task.keys, tiles.first, task.last_position, keys);
  commit_copies();
  ELLM_NO_UNROLL
  for (int32_t tile = tiles.first; tile <= tiles.last; ++tile) {
    wait_copies<0>();
    sync_block();  // K is there, and every warp is done with the V before
    load_tile<kHeadDim>(args, task.values, tile, task.last_position, values);
    commit_copies();

    float scores[kRowTiles][Memory::kTile / 8][4] = {};
    ELLM_NO_UNROLL  // or loads would be moved up and take registers that are not there
        for (int32_t column = 0; column < kHeadDim; column += 16) {
      uint32_t q[kRowTiles][4];
      ELLM_UNROLL
      for (int32_t m = 0; m < kRowTiles; ++m) {
        load_left<Memory::kPitch>(q[m], shared, first_row + 16 * m, column);
      }
      ELLM_UNROLL
      for (int32_t token = 0; token < Memory::kTile; token += 16) {
        uint32_t k[4];
        load_keys<Memory::kPitch>(k, keys, token, column);
        ELLM_UNROLL
        for (int32_t m = 0; m < kRowTiles; ++m) {
          E::multiply_add(scores[m][token / 8], q[m], k[0], k[1]);
          E::multiply_add(scores[m][token / 8 + 1], q[m], k[2], k[3]);
        }
      }
    }
    wait_copies<0>();
    sync_block();  // V is there, and every warp is done with K

    uint32_t weights[kRowTiles][Memory::kTile / 16][4];
    const bool whole =
        sees_whole_tile(tile, task.first_position, task.last_position, window, Memory::kTile);
    ELLM_UNROLL
    for (int32_t m = 0; m < kRowTiles; ++m) {
      cap_scores(scores[m], scale);
      if (!whole) {
        mask_scores(scores[m],
                    visible_to(args, task, window, lane_row + 16 * m, tile * Memory::kTile));
      }
      float keep[2];
      state[m].weigh(scores[m], scale.factor, keep);
      rescale(sums[m], keep);
      ELLM_UNROLL
      for (int32_t step = 0; step < Memory::kTile / 16; ++step) {
        pack_weights<E>(weights[m][step], scores[m], step);
      }
    }
    // Only now, when the registers of the scores are free.
    if (tile < tiles.last) {
      load_tile<kHeadDim>(args, task.keys, tile + 1, task.last_position, keys);
    }
    commit_copies();
    ELLM_UNROLL
    for (int32_t step = 0; step < Memory::kTile / 16; ++step) {
      ELLM_UNROLL
      for (int32_t column = 0; column < kHeadDim; column += 16) {
        uint32_t v[4];
        load_values<Memory::kPitch>(v, values, 16 * step, column);
        ELLM_UNROLL
        for (int32_t m = 0; m < kRowTiles; ++m) {
          E::multiply_add(sums[m][column / 8], weights[m][step], v[0], v[1]);
          E::multiply_add(sums[m][column / 8 + 1], weights[m][step], v[2], v[3]);
        }
      }
    }
  }
  ELLM_UNROLL
  for (int32_t m = 0; m < kRowTiles; ++m) {
    store_rows<E, kHeadDim>(args, task, state[m], sums[m], first_row + 16 * m, shared);
  }
}

// A fixed number of blocks, each of which takes unit after unit.
template <class E, int32_t kHeadDim>
ELLM_KERNEL void ELLM_LAUNCH_BOUNDS(PrefillMemory<kHeadDim>::kThreads, kHeadDim <= 128 ? 2 : 1)
    prefill(const AttentionArgs args) {
  using Memory = PrefillMemory<kHeadDim>;
  char* shared = shared_memory();
  auto* next = reinterpret_cast<int32_t*>(shared + Memory::kNotes);
  WorkHeader* header = args.workspace.header;
  int32_t unit = block_index();
  while (unit < header->prefill_units * args.kv.kv_heads) {
    prefill_block<E, kHeadDim>(args, prefill_task(args, unit), shared);
    // Not asked for earlier: there is no register to keep the answer in.
    if (thread_index() == 0) *next = grid_blocks() + take(&header->prefill_taken);
    sync_block();
    unit = *next;
  }
}

}  // namespace ellm::cuda
