// What a block of the decode kernel works on.
#pragma once

#include "kernels/cuda/fragments.h"

namespace ellm::cuda {

constexpr int32_t kDecodeWarps = 4;
constexpr int32_t kDecodeThreads = kDecodeWarps * kWarp;
// Tokens that a warp loads and takes in at a time.
constexpr int32_t kDecodeStep = 16;
// Query rows of a tensor core product: the heads of a group, padded.
constexpr int32_t kDecodeRows = 16;

// A part of the context of one row, and the query heads of a group.
struct DecodeTask {
  int32_t decode_row;
  int32_t part;   // from the first that the row sees
  int32_t parts;  // of the row
  int32_t row;    // of q
  int32_t kv_head;
  int32_t head;   // first query head
  int32_t heads;  // up to kDecodeRows
  int32_t begin;  // tokens
  int32_t end;
  const char* keys;
  const char* values;
};

// Blocks of kDecodeRows query heads that share a KV head.
ELLM_HOST_DEVICE int32_t head_blocks(int32_t group) {
  return static_cast<int32_t>(ceil_div(group, kDecodeRows));
}

ELLM_DEVICE DecodeTask decode_task(const AttentionArgs& args, int32_t index) {
  const int32_t group = args.group.value();
  const int32_t blocks = args.kv.kv_heads * head_blocks(group);
  const DecodeUnit unit = args.workspace.decode_units[index / blocks];
  const int32_t block = index % blocks;
  const SequenceSpan span = args.step.span(args.workspace.decode_spans[unit.row]);
  const int32_t layer = args.layer[0];
  const int32_t window = args.window[0];
  const Parts parts = parts_of(span.context_tokens, window, args.workspace.most_parts);

  DecodeTask task;
  task.decode_row = unit.row;
  task.part = unit.part;
  task.parts = parts.count;
  task.row = span.row_begin;
  task.kv_head = block % args.kv.kv_heads;
  const int32_t first = block / args.kv.kv_heads * kDecodeRows;
  task.head = task.kv_head * group + first;
  task.heads = at_most(group - first, kDecodeRows);
  task.begin =
      at_least((parts.first + unit.part) * parts.tokens, first_seen(span.context_tokens, window));
  task.end = at_most((parts.first + unit.part + 1) * parts.tokens, span.context_tokens + 1);
  task.keys = args.kv.head(span.slot, layer, 0, task.kv_head);
  task.values = args.kv.head(span.slot, layer, 1, task.kv_head);
  return task;
}

}  // namespace ellm::cuda
