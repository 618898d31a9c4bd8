#include "kv/layout.h"

#include <algorithm>
#include <initializer_list>
#include <string>

#include "memory/text.h"

namespace ellm {
namespace {

constexpr int64_t kSmallestChunkBytes = int64_t{64} << 10;
constexpr int64_t kUsualChunkBytes = int64_t{2} << 20;
constexpr int64_t kLargestChunkBytes = int64_t{64} << 20;
constexpr int64_t kSmallestTileTokens = 16;
constexpr int64_t kSmallestScaledTileTokens = 24;
constexpr int64_t kLargestTileTokens = 64;
constexpr int64_t kLargestScaledTileTokens = 128;
constexpr int64_t kLargestForcedTileTokens = 256;
constexpr int64_t kFewestTileTokens = 8;  // that the kernels reckon with
constexpr int64_t kAddressBytes = int64_t{1} << 47;

Status invalid(std::string message) { return Status(Code::kInvalid, std::move(message)); }

// False if the product does not fit; all factors are positive.
bool multiply(std::initializer_list<int64_t> factors, int64_t* product) {
  *product = 1;
  for (const int64_t factor : factors) {
    if (__builtin_mul_overflow(*product, factor, product)) return false;
  }
  return true;
}

// What the tokens of a tile are a multiple of: the kernels of GPUs take rows by eights, and read no
// scales.
int64_t tile_multiple(const KvLayout& layout) { return layout.scale_bytes == 0 ? 8 : 1; }

int64_t smallest_tile(const KvLayout& layout) {
  return layout.scale_bytes == 0 ? kSmallestTileTokens : kSmallestScaledTileTokens;
}

bool is_power_of_two(int64_t value) { return value > 0 && (value & (value - 1)) == 0; }

// Checks what a caller chooses, and that a token's size is a number.
Status check_shape(const KvLayout& layout) {
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"layers", layout.layers},
               {"kv_heads", layout.kv_heads},
               {"head_dim", layout.head_dim},
               {"num_slots", layout.num_slots},
               {"max_tokens", layout.max_tokens}};
  for (const auto& size : sizes) {
    if (size.value < 1 || size.value > INT32_MAX) {
      return invalid(std::string(size.name) + " is " + std::to_string(size.value) +
                     "; it must be from 1 to 2147483647");
    }
  }
  if (layout.element_bytes != 1 && layout.element_bytes != 2 && layout.element_bytes != 4) {
    return invalid("element_bytes is " + std::to_string(layout.element_bytes) +
                   "; it must be 1, 2 or 4");
  }
  if (layout.scale_bytes != 0 && (layout.scale_bytes != 4 || layout.element_bytes != 1)) {
    return invalid("scale_bytes is " + std::to_string(layout.scale_bytes) +
                   " with element_bytes of " + std::to_string(layout.element_bytes) +
                   "; it must be 0, or 4 with element_bytes of 1");
  }
  int64_t row_bytes, token_bytes;
  if (!multiply({layout.head_dim, layout.element_bytes}, &row_bytes) ||
      !multiply({layout.layers, 2, layout.kv_heads, row_bytes + layout.scale_bytes},
                &token_bytes)) {
    return invalid("the K and V of one token overflow 64 bits; check layers, kv_heads, head_dim");
  }
  return Status::Ok();
}

Status check_addresses(const KvLayout& layout) {
  int64_t reserved;
  if (multiply({layout.slot_bytes, layout.num_slots}, &reserved) && reserved < kAddressBytes) {
    return Status::Ok();
  }
  return invalid(std::to_string(layout.num_slots) + " slots of " +
                 human_bytes(static_cast<size_t>(layout.slot_bytes)) +
                 " are more than the addresses of a process (" +
                 human_bytes(static_cast<size_t>(kAddressBytes)) +
                 "); lower num_slots or max_tokens");
}

// Most tokens of a tile in a chunk of so many bytes; 0 where there are none.
int64_t largest_tile(KvLayout layout, int64_t chunk_bytes, bool forced) {
  const int64_t usual = layout.scale_bytes == 0 ? kLargestTileTokens : kLargestScaledTileTokens;
  const int64_t multiple = tile_multiple(layout);
  const int64_t fitting = chunk_bytes / layout.token_bytes() / multiple * multiple;
  layout.tile_tokens = std::min(fitting, forced ? kLargestForcedTileTokens : usual);
  while (layout.tile_tokens > 0 && layout.tile_bytes() > chunk_bytes) {
    layout.tile_tokens -= multiple;  // What aligns values and scales did not fit.
  }
  return layout.tile_tokens;
}

}  // namespace

Result<KvLayout> KvLayout::Choose(int64_t layers, int64_t kv_heads, int64_t head_dim,
                                  int64_t element_bytes, int64_t max_tokens, int64_t num_slots,
                                  int64_t granularity_bytes, int64_t scale_bytes) {
  KvLayout layout;
  layout.layers = layers;
  layout.kv_heads = kv_heads;
  layout.head_dim = head_dim;
  layout.element_bytes = element_bytes;
  layout.scale_bytes = scale_bytes;
  layout.num_slots = num_slots;
  layout.max_tokens = max_tokens;
  if (Status s = check_shape(layout); !s.ok()) return s;
  if (!is_power_of_two(granularity_bytes) || granularity_bytes > kLargestChunkBytes) {
    return invalid("granularity_bytes is " + std::to_string(granularity_bytes) +
                   "; it must be a power of two up to " +
                   human_bytes(static_cast<size_t>(kLargestChunkBytes)));
  }

  const int64_t token_bytes = layout.token_bytes();
  const int64_t smallest = std::max(kSmallestChunkBytes, granularity_bytes);
  for (int64_t chunk = smallest; chunk <= kLargestChunkBytes; chunk *= 2) {
    if (chunk > std::max(kUsualChunkBytes, smallest) && layout.chunk_bytes != 0) break;
    const bool forced = chunk == smallest && smallest > kSmallestChunkBytes;
    const int64_t tile = largest_tile(layout, chunk, forced);
    if (tile < smallest_tile(layout)) continue;
    // tile / chunk is the used share; both sides stay far below 2^63.
    if (layout.chunk_bytes == 0 || tile * layout.chunk_bytes > layout.tile_tokens * chunk) {
      layout.chunk_bytes = chunk;
      layout.tile_tokens = tile;
    }
  }
  if (layout.chunk_bytes == 0) {
    return invalid("the K and V of one token take " +
                   human_bytes(static_cast<size_t>(token_bytes)) + " and a chunk of at most " +
                   human_bytes(static_cast<size_t>(kLargestChunkBytes)) + " has to hold " +
                   std::to_string(smallest_tile(layout)) + "; use a smaller element type");
  }
  layout.slot_bytes = layout.chunks_for(max_tokens) * layout.chunk_bytes;
  if (Status s = check_addresses(layout); !s.ok()) return s;
  return layout;
}

Status KvLayout::validate() const {
  if (Status s = check_shape(*this); !s.ok()) return s;
  if (tile_tokens < kFewestTileTokens || tile_tokens % tile_multiple(*this) != 0 ||
      tile_tokens > INT32_MAX) {
    return invalid("tile_tokens is " + std::to_string(tile_tokens) + "; it must be " +
                   (scale_bytes == 0 ? "a positive multiple of 8" : "at least 8"));
  }
  int64_t unaligned_bytes;
  if (!is_power_of_two(chunk_bytes) || !multiply({tile_tokens, token_bytes()}, &unaligned_bytes) ||
      unaligned_bytes > chunk_bytes || tile_bytes() > chunk_bytes) {
    return invalid("chunk_bytes is " + std::to_string(chunk_bytes) +
                   "; it must be a power of two that holds " + std::to_string(tile_tokens) +
                   " tokens of " + std::to_string(token_bytes()) + " bytes");
  }
  int64_t needed;
  if (!multiply({chunks_for(max_tokens), chunk_bytes}, &needed) || slot_bytes < needed ||
      slot_bytes % chunk_bytes != 0) {
    return invalid("slot_bytes is " + std::to_string(slot_bytes) + "; it must be whole chunks of " +
                   std::to_string(chunk_bytes) + " bytes that hold " + std::to_string(max_tokens) +
                   " tokens");
  }
  return check_addresses(*this);
}

}  // namespace ellm
