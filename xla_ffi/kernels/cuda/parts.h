// Which tokens a row sees, and how they are divided. Functions of the row's position (and of the
// model), never of the batch: that is what makes a row come out the same in any batch.
#pragma once

#include "kernels/cuda/host_device.h"

namespace ellm::cuda {

// A context shorter than this is not worth dividing.
constexpr int32_t kLeastPartTokens = 256;
// Parts begin at multiples of this.
constexpr int32_t kPartGranule = 64;
// (Row, KV head, part) units that keep a GPU busy. With as many for a single long row, batch size 1
// already uses most of the memory bandwidth.
constexpr int32_t kUnitsPerRow = 128;
constexpr int32_t kLeastMostParts = 16;
// Parts of so many tokens are taken before shorter ones: begun last they would run alone.
constexpr int32_t kLongPartTokens = 1024;

// First token that the token at `position` sees.
ELLM_HOST_DEVICE int32_t first_seen(int32_t position, int32_t window) {
  return window > 0 ? at_least(0, position + 1 - window) : 0;
}

// Parts of about equal length that a long context is divided into.
ELLM_HOST_DEVICE int32_t most_parts(int32_t kv_heads) {
  return at_least(kLeastMostParts, kUnitsPerRow / kv_heads);
}

// The tokens that a row sees, cut at the multiples of `tokens`: parts `first` to `first + count`.
struct Parts {
  int32_t tokens;
  int32_t first;
  int32_t count;
};

ELLM_HOST_DEVICE Parts parts_of(int32_t position, int32_t window, int32_t most) {
  const int32_t begin = first_seen(position, window);
  const int32_t seen = position + 1 - begin;
  const int32_t equal = static_cast<int32_t>(round_up(ceil_div(seen, most), kPartGranule));
  const int32_t tokens = at_least(kLeastPartTokens, equal);
  const int32_t first = begin / tokens;
  return {tokens, first, position / tokens - first + 1};
}

// The largest count of parts_of() with contexts up to max_tokens. A window that begins inside a
// part can touch one more than it is long.
ELLM_HOST_DEVICE int32_t parts_capacity(int64_t max_tokens, int32_t most) {
  const int64_t all = ceil_div(max_tokens, kLeastPartTokens);
  return static_cast<int32_t>(all < most + 1 ? all : most + 1);
}

// Tokens of a span whose query rows (times group) fill a block of `block_rows` rows.
ELLM_HOST_DEVICE int32_t tokens_per_block(int32_t block_rows, int32_t group) {
  return block_rows / group;
}

// Tiles of `tile` tokens, at absolute multiples, that the tokens [begin, end) of a context need.
struct TileRange {
  int32_t first;
  int32_t last;  // inclusive
};

ELLM_HOST_DEVICE TileRange tiles_of(int32_t first_position, int32_t last_position, int32_t window,
                                    int32_t tile) {
  return {first_seen(first_position, window) / tile, last_position / tile};
}

// Whether every query from first_position to last_position sees all tokens of tile `i`.
ELLM_HOST_DEVICE bool sees_whole_tile(int32_t i, int32_t first_position, int32_t last_position,
                                      int32_t window, int32_t tile) {
  return (i + 1) * tile <= first_position + 1 && i * tile >= first_seen(last_position, window);
}

}  // namespace ellm::cuda
