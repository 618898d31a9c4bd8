// What the attention kernels are launched with: plain values and device addresses.
#pragma once

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/workspace.h"
#include "kv/layout.h"
#include "kv/step.h"

namespace ellm::cuda {

// KvLayout as the kernels need it: where the K and V of a token lie.
struct KvView {
  char* base = nullptr;  // slot 0
  int64_t slot_bytes = 0;
  int64_t chunk_bytes = 0;
  int64_t row_bytes = 0;  // one token of one head
  Divisor tile;           // tokens of a chunk
  int32_t kv_heads = 0;

  KvView() = default;
  KvView(const KvLayout& layout, char* base)
      : base(base),
        slot_bytes(layout.slot_bytes),
        chunk_bytes(layout.chunk_bytes),
        row_bytes(layout.head_dim * layout.element_bytes),
        tile(static_cast<int32_t>(layout.tile_tokens)),
        kv_heads(static_cast<int32_t>(layout.kv_heads)) {}

  // Token 0 of (slot, layer, K = 0 or V = 1, head).
  ELLM_HOST_DEVICE char* head(int32_t slot, int32_t layer, int32_t kv, int32_t head) const {
    const int64_t heads_before = (int64_t{layer} * 2 + kv) * kv_heads + head;
    return base + slot * slot_bytes + heads_before * tile.value() * row_bytes;
  }
  // From token 0 of a head to `token`. The rows from there to the next multiple of 8 tokens lie one
  // after the other.
  ELLM_HOST_DEVICE int64_t token(int32_t token) const {
    const int32_t chunk = tile.quotient(token);
    return chunk * chunk_bytes + (token - chunk * tile.value()) * row_bytes;
  }
  // The same for a token that may not be `mapped`: then that of token 0, which is.
  ELLM_HOST_DEVICE int64_t token_or_first(int32_t token, bool mapped) const {
    return mapped ? this->token(token) : 0;
  }
  // From the first of 8 tokens that lie one after the other to 16 bytes of the token `row`, which
  // begin `column_bytes` into it; never past the 8 tokens, where memory may end.
  ELLM_HOST_DEVICE int32_t within_eight(int32_t row, int32_t column_bytes) const {
    const auto bytes = static_cast<int32_t>(row_bytes);
    return at_most(row * bytes + column_bytes, 8 * bytes - 16);
  }
};

// The metadata of a step as it lies on the device: header and spans; the rest is not for attention.
struct DeviceStep {
  const int32_t* words = nullptr;

  ELLM_HOST_DEVICE const StepHeader& header() const {
    return *reinterpret_cast<const StepHeader*>(words);
  }
  ELLM_HOST_DEVICE int32_t num_spans() const { return header().num_sequences; }
  ELLM_HOST_DEVICE int32_t num_rows() const { return header().num_rows; }
  ELLM_HOST_DEVICE const SequenceSpan& span(int32_t i) const {
    return reinterpret_cast<const SequenceSpan*>(words + header().spans_offset)[i];
  }
};

struct AttentionArgs {
  const void* q = nullptr;  // [rows, q_heads, head_dim]
  const void* k = nullptr;  // [rows, kv_heads, head_dim]
  const void* v = nullptr;  // like k
  void* out = nullptr;      // like q
  DeviceStep step;
  const int32_t* layer = nullptr;
  const int32_t* window = nullptr;  // a token sees the last so many; 0: all
  const int32_t* epoch = nullptr;
  int32_t* epoch_out = nullptr;
  KvView kv;
  int32_t rows = 0;
  int32_t q_heads = 0;
  int32_t head_dim = 0;
  Divisor group;          // query heads of a KV head
  float scale = 0.0f;     // multiplies q . k; positive
  float soft_cap = 0.0f;  // cap * tanh(score / cap); 0: none
  Workspace workspace;
};

}  // namespace ellm::cuda
