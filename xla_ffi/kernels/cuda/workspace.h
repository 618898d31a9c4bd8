// The memory of one attention call besides its operands: the list of work and the partial results.
// Its size is a function of shapes, so it is part of what a compiled step is known to need.
#pragma once

#include "kernels/cuda/host_device.h"
#include "kernels/cuda/parts.h"

namespace ellm::cuda {

enum class Element : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int32_t element_bytes(Element element) { return element == Element::kFloat32 ? 4 : 2; }

// What sizes the workspace.
struct AttentionShape {
  Element element;
  int64_t rows;       // T
  int64_t sequences;  // most spans of the step
  int64_t q_heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t max_tokens;  // of a slot
};

// Query rows (tokens times query heads of a KV head) of a block of the prefill kernels.
constexpr int32_t kPrefillRows = 128;

// The largest head size.
constexpr int64_t kMostHeadDim = 256;

// Whether the tensor core kernels take such heads; the others go to the exact one, which needs no
// workspace.
inline bool on_tensor_cores(const AttentionShape& shape) {
  return shape.element != Element::kFloat32 && shape.head_dim % 8 == 0 &&
         shape.head_dim <= kMostHeadDim && shape.q_heads / shape.kv_heads <= kPrefillRows;
}

// Counts of work, and which of it is taken. Blocks take the next unit when they are done with one;
// what a unit yields does not depend on who takes it when.
struct WorkHeader {
  int32_t decode_units;  // without heads
  int32_t prefill_units;
  int32_t decode_taken;
  int32_t prefill_taken;
};

// A row that is its span's only one, and a part of its context.
struct DecodeUnit {
  int32_t row;   // index among the decode rows
  int32_t part;  // counted from the first part that the row sees
};

// A block of tokens of a span that has several.
struct PrefillUnit {
  int32_t span;
  int32_t block;
};

// Softmax of a row over a part: maximum (to the base 2) and sum; the weighted V, unnormalised, lie
// apart.
struct alignas(8) PartStats {
  float max;
  float sum;
};

// Addresses in the workspace, and the bounds of what lies there.
struct Workspace {
  WorkHeader* header = nullptr;
  int32_t* decode_spans = nullptr;       // [row_capacity]
  DecodeUnit* decode_units = nullptr;    // [row_capacity * parts_capacity]
  int32_t* arrivals = nullptr;           // [row_capacity, q_heads]: parts done, by first head
  PrefillUnit* prefill_units = nullptr;  // [prefill_capacity]
  PartStats* stats = nullptr;            // [row_capacity, parts_capacity, q_heads]
  float* values = nullptr;               // [row_capacity, parts_capacity, q_heads, head_dim]
  int32_t most_parts = 0;
  int32_t row_capacity = 0;
  int32_t parts_capacity = 0;
  int32_t prefill_capacity = 0;
  int64_t bytes = 0;

  Workspace() = default;
  // Lays `shape` out from `base`, which is aligned to 128 bytes; null to learn the size. Empty
  // where the shape needs none.
  Workspace(const AttentionShape& shape, char* base) {
    if (!on_tensor_cores(shape)) return;
    const int32_t group = static_cast<int32_t>(shape.q_heads / shape.kv_heads);
    const int32_t block = at_least(1, tokens_per_block(kPrefillRows, group));
    most_parts = cuda::most_parts(static_cast<int32_t>(shape.kv_heads));
    row_capacity =
        static_cast<int32_t>(shape.rows < shape.sequences ? shape.rows : shape.sequences);
    parts_capacity = cuda::parts_capacity(shape.max_tokens, most_parts);
    const bool several_rows = shape.rows > shape.sequences;
    prefill_capacity =
        several_rows ? static_cast<int32_t>(shape.rows / block + shape.sequences) : 0;

    const int64_t parts = int64_t{row_capacity} * parts_capacity;
    place(base, 1, &header);
    place(base, row_capacity, &decode_spans);
    place(base, parts, &decode_units);
    place(base, row_capacity * shape.q_heads, &arrivals);
    place(base, prefill_capacity, &prefill_units);
    place(base, parts * shape.q_heads, &stats);
    place(base, parts * shape.q_heads * shape.head_dim, &values);
  }

  // Whether every sequence has to have one row: a step of no more rows than sequences is for
  // decodes, and is launched without the prefill kernels.
  ELLM_HOST_DEVICE bool decodes_only() const { return prefill_capacity == 0; }

 private:
  template <class T>
  void place(char* base, int64_t count, T** at) {
    if (base != nullptr) *at = reinterpret_cast<T*>(base + bytes);
    bytes += round_up(count * static_cast<int64_t>(sizeof(T)), 128);
  }
};

}  // namespace ellm::cuda
