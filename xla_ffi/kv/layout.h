// Where the K and V of a token lie. The one place that knows the formula.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/status.h"

namespace ellm {

// One address range is cut into `num_slots` slots; a slot is a row of chunks; a chunk holds one
// tile: `tile_tokens` tokens with all layers. Inside a chunk the order is layer, K or V, head,
// token, dim. Where elements are int8 with scales, each K and V of a layer is followed by its
// scales, a float32 for each row of head_dim elements: head, token. Values and scales begin at
// multiples of 64 bytes then.
struct KvLayout {
  int64_t layers = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t element_bytes = 0;
  int64_t scale_bytes = 0;  // Of a row; 4, or 0 where elements are what they are.
  int64_t tile_tokens = 0;  // At least 8; without scales a multiple of 8.
  int64_t chunk_bytes = 0;  // At least tile_bytes().
  int64_t slot_bytes = 0;   // Whole chunks, enough for max_tokens.
  int64_t num_slots = 0;
  int64_t max_tokens = 0;  // Per slot.

  // Picks chunk and tile: the power-of-two chunk from 64 KiB (or the driver's granularity) to 2 MiB
  // that wastes least with a tile of 16 to 64 tokens, the smaller of equals. Where a token is so
  // large that 2 MiB holds fewer than 16, larger chunks, up to 64 MiB. Where the granularity leaves
  // no smaller chunk than one that 64 tokens do not fill, tiles of up to 256. With scales, tiles of
  // 24 to 128, and of any number of tokens: a power of two of them hardly ever fits.
  // Errors: kInvalid for sizes below 1, element_bytes not 1, 2 or 4, scale_bytes not 0, nor 4 with
  // element_bytes of 1, tokens too large for a chunk, or more addresses than a process has (2^47).
  static Result<KvLayout> Choose(int64_t layers, int64_t kv_heads, int64_t head_dim,
                                 int64_t element_bytes, int64_t max_tokens, int64_t num_slots,
                                 int64_t granularity_bytes = 4096, int64_t scale_bytes = 0);

  // Errors: kInvalid where fields contradict each other or the limits above.
  Status validate() const;

  // K and V of one token in all layers, scales included; what aligns them is not.
  int64_t token_bytes() const { return layers * 2 * kv_heads * (row_bytes() + scale_bytes); }
  // All of a tile.
  int64_t tile_bytes() const { return layers * 2 * side_bytes(); }
  int64_t chunks_for(int64_t tokens) const { return (tokens + tile_tokens - 1) / tile_tokens; }
  int64_t slot_chunks() const { return slot_bytes / chunk_bytes; }
  int64_t reserved_bytes() const { return slot_bytes * num_slots; }

  // From the slot's base to element 0 of (layer, K = 0 or V = 1, head, token); from there head_dim
  // elements follow each other, and so do the tokens of a tile. token is in [0, max_tokens).
  int64_t offset_bytes(int64_t layer, int64_t kv, int64_t head, int64_t token) const {
    return side_offset_bytes(layer, kv, token) + row(head, token) * row_bytes();
  }
  // The same to the scale of that row, where there are any; those of a tile follow each other.
  int64_t scale_offset_bytes(int64_t layer, int64_t kv, int64_t head, int64_t token) const {
    return side_offset_bytes(layer, kv, token) + values_bytes() + row(head, token) * scale_bytes;
  }

 private:
  static constexpr int64_t kAlignment = 64;

  int64_t row_bytes() const { return head_dim * element_bytes; }
  int64_t aligned(int64_t bytes) const {
    return scale_bytes == 0 ? bytes : (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  // The K, or the V, of a layer in a tile: all values, and they with their scales.
  int64_t values_bytes() const { return aligned(kv_heads * tile_tokens * row_bytes()); }
  int64_t side_bytes() const {
    return values_bytes() + aligned(kv_heads * tile_tokens * scale_bytes);
  }
  int64_t side_offset_bytes(int64_t layer, int64_t kv, int64_t token) const {
    return (token / tile_tokens) * chunk_bytes + (layer * 2 + kv) * side_bytes();
  }
  int64_t row(int64_t head, int64_t token) const {
    return head * tile_tokens + token % tile_tokens;
  }
};

}  // namespace ellm
