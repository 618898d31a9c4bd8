// Attention of many tokens of a sequence on Hopper: as prefill.h, with products of whole
// warpgroups from shared memory, tiles of 128 tokens, and K and V of the next tile on their way
// while one is taken in. After Shah et al., "FlashAttention-3" (2024), without its specialised
// warps: what they load here are pieces of virtual memory that may end anywhere.
#pragma once

#include "kernels/cuda/device_hopper.h"
#include "kernels/cuda/prefill.h"

namespace ellm::cuda {

constexpr int32_t kHopperTile = 128;
constexpr int32_t kWarpgroupRows = 64;
constexpr int32_t kHopperThreads = kPrefillRows / kWarpgroupRows * 4 * kWarp;

// Shared memory: the queries, and two stages of a tile of K and one of V.
template <int32_t kHeadDim>
struct HopperMemory {
  static_assert(kHeadDim % kSwizzledColumns == 0);
  static constexpr int32_t kGroups = kHeadDim / kSwizzledColumns;
  static constexpr int32_t kQueryGroupBytes = kPrefillRows * kSwizzledRowBytes;
  static constexpr int32_t kTileGroupBytes = kHopperTile * kSwizzledRowBytes;
  static constexpr int32_t kTileBytes = kGroups * kTileGroupBytes;
  static constexpr int32_t kStages = kGroups * kQueryGroupBytes;
  static constexpr int32_t kStageBytes = 2 * kTileBytes;
  static constexpr int32_t kNotes = kStages + 2 * kStageBytes;
  static constexpr int32_t kBytes = kNotes + 16;
};

// Starts the copies of a tile of K and one of V, as load_tile() of prefill.h.
template <int32_t kHeadDim>
ELLM_DEVICE void load_stage(const AttentionArgs& args, const PrefillTask& task, int32_t tile,
                            char* stage) {
  using Memory = HopperMemory<kHeadDim>;
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  // Threads that copy one group of eight tokens, whose memory is contiguous.
  constexpr int32_t kGroupThreads = kHopperThreads / (kHopperTile / 8);
  const int32_t first_row = thread_index() / kGroupThreads * 8;
  const int32_t token = tile * kHopperTile + first_row;
  const int64_t from = args.kv.token_or_first(token, token <= task.last_position);
  ELLM_UNROLL
  for (int32_t i = 0; i < 8 * kVectors / kGroupThreads; ++i) {
    const int32_t row = (i * kGroupThreads + thread_index() % kGroupThreads) / kVectors;
    const int32_t vector = (i * kGroupThreads + thread_index() % kGroupThreads) % kVectors;
    const bool valid =
        token + row <= task.last_position && vector * kVectorElements < args.head_dim;
    const int64_t offset = from + args.kv.within_eight(row, vector * kVectorBytes);
    char* to = stage + swizzled_offset(kHopperTile, first_row + row, vector);
    copy_async(to, task.keys + offset, valid);
    copy_async(to + Memory::kTileBytes, task.values + offset, valid);
  }
}

template <int32_t kHeadDim>
ELLM_DEVICE void load_hopper_queries(const AttentionArgs& args, const PrefillTask& task,
                                     char* queries) {
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  for (int32_t i = thread_index(); i < kPrefillRows * kVectors; i += kHopperThreads) {
    const int32_t row = i / kVectors;
    const int32_t vector = i % kVectors;
    const bool valid = row < task.query_rows && vector * kVectorElements < args.head_dim;
    copy_async(queries + swizzled_offset(kPrefillRows, row, vector),
               static_cast<const char*>(args.q) + query_offset(args, task, valid ? row : 0) +
                   (valid ? vector * kVectorBytes : 0),
               valid);
  }
}

// As store_rows() of prefill.h, over swizzled rows.
template <class E, int32_t kHeadDim>
ELLM_DEVICE void store_hopper_rows(const AttentionArgs& args, const PrefillTask& task,
                                   const RowState& state, const float (&values)[kHeadDim / 8][4],
                                   int32_t first_row, char* queries) {
  constexpr int32_t kVectors = kHeadDim / kVectorElements;
  const int32_t lane = thread_index() % kWarp;
  ELLM_UNROLL
  for (int32_t r = 0; r < 2; ++r) {
    const float share = 1.0f / state.total(r);
    ELLM_UNROLL
    for (int32_t j = 0; j < kVectors; ++j) {
      char* to = queries + swizzled_offset(kPrefillRows, first_row + lane / 4 + 8 * r, j);
      *reinterpret_cast<uint32_t*>(to + lane % 4 * 4) =
          E::pack(values[j][2 * r] * share, values[j][2 * r + 1] * share);
    }
  }
  sync_warp();
  for (int32_t i = lane; i < 16 * kVectors; i += kWarp) {
    const int32_t row = first_row + i / kVectors;
    const int32_t vector = i % kVectors;
    if (row < task.query_rows && vector * kVectorElements < args.head_dim) {
      *reinterpret_cast<Bytes16*>(static_cast<char*>(args.out) + query_offset(args, task, row) +
                                  vector * kVectorBytes) =
          *reinterpret_cast<const Bytes16*>(queries + swizzled_offset(kPrefillRows, row, vector));
    }
  }
}

template <class E, int32_t kHeadDim>
ELLM_DEVICE void prefill_hopper_block(const AttentionArgs& args, const PrefillTask& task,
                                      char* shared) {
  using Memory = HopperMemory<kHeadDim>;
  const ScoreScale scale(args);
  const int32_t window = args.window[0];
  const int32_t group_row = thread_index() / (4 * kWarp) * kWarpgroupRows;
  const int32_t warp_row = thread_index() / kWarp * 16;
  const int32_t lane_row = warp_row + thread_index() % kWarp / 4;
  const auto stage = [&](int32_t tile) {
    return shared + Memory::kStages + tile % 2 * Memory::kStageBytes;
  };
  const uint64_t queries = describe_tile(shared_address(shared + group_row * kSwizzledRowBytes),
                                         Memory::kQueryGroupBytes);
  const TileRange tiles = tiles_of(task.first_position, task.last_position, window, kHopperTile);

  RowState state;
  state.reset();
  float sums[kHeadDim / 8][4] = {};
  load_hopper_queries<kHeadDim>(args, task, shared);
  load_stage<kHeadDim>(args, task, tiles.first, stage(tiles.first));
  commit_copies();
  ELLM_NO_UNROLL
  for (int32_t tile = tiles.first; tile <= tiles.last; ++tile) {
    wait_copies<0>();
    publish_to_products();
    sync_block();  // the tile is there, and every warp is done with the stage to be filled

    float scores[kHopperTile / 8][4];
    const uint64_t keys = describe_tile(shared_address(stage(tile)), Memory::kTileGroupBytes);
    begin_products();
    ELLM_UNROLL
    for (int32_t step = 0; step < kHeadDim / 16; ++step) {
      constexpr int32_t kSteps = kSwizzledColumns / 16;  // of a group of columns
      const int32_t group = step / kSteps;
      const int32_t within = step % kSteps * 32;
      multiply_tiles(E(), scores, advance(queries, group * Memory::kQueryGroupBytes + within),
                     advance(keys, group * Memory::kTileGroupBytes + within), step > 0);
    }
    commit_products();
    // Here, where the tensor cores have something to do meanwhile.
    if (tile < tiles.last) load_stage<kHeadDim>(args, task, tile + 1, stage(tile + 1));
    commit_copies();
    wait_products();
    settle(scores);

    cap_scores(scores, scale);
    if (!sees_whole_tile(tile, task.first_position, task.last_position, window, kHopperTile)) {
      mask_scores(scores, visible_to(args, task, window, lane_row, tile * kHopperTile));
    }
    float keep[2];
    state.weigh(scores, scale.factor, keep);
    rescale(sums, keep);
    uint32_t weights[kHopperTile / 16][4];
    ELLM_UNROLL
    for (int32_t step = 0; step < kHopperTile / 16; ++step) {
      pack_weights<E>(weights[step], scores, step);
    }

    const uint64_t values =
        describe_tile(shared_address(stage(tile) + Memory::kTileBytes), Memory::kTileGroupBytes);
    settle(weights);
    settle(sums);
    begin_products();
    ELLM_UNROLL
    for (int32_t step = 0; step < kHopperTile / 16; ++step) {
      multiply_with_tile(E(), sums, weights[step], advance(values, 16 * step * kSwizzledRowBytes));
    }
    commit_products();
    wait_products();
    settle(sums);
  }
  sync_block();  // every warp is done with the queries, over which the results are written
  store_hopper_rows<E, kHeadDim>(args, task, state, sums, warp_row, shared);
}

// A fixed number of blocks, each of which takes unit after unit.
template <class E, int32_t kHeadDim>
ELLM_KERNEL void ELLM_LAUNCH_BOUNDS(kHopperThreads, 1) prefill_hopper(const AttentionArgs args) {
  using Memory = HopperMemory<kHeadDim>;
  char* shared = shared_memory();
  auto* next = reinterpret_cast<int32_t*>(shared + Memory::kNotes);
  WorkHeader* header = args.workspace.header;
  int32_t unit = block_index();
  while (unit < header->prefill_units * args.kv.kv_heads) {
    // Asked for early and used late, so that nothing waits for the answer.
    int32_t mine = 0;
    if (thread_index() == 0) mine = grid_blocks() + take(&header->prefill_taken);
    prefill_hopper_block<E, kHeadDim>(args, prefill_task(args, unit), shared);
    if (thread_index() == 0) *next = mine;
    sync_block();
    unit = *next;
  }
}

}  // namespace ellm::cuda
