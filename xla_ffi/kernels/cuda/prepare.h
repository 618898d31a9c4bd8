// The first kernel of an attention call: writes the new K and V into their slots, clears the rows
// that no sequence uses, and lists the work of the kernels that follow.
#pragma once

#include <cstring>

#include "kernels/cuda/fragments.h"

namespace ellm::cuda {

constexpr int32_t kPrepareThreads = 128;

// The span that `row` belongs to, found by a whole warp; spans lie in the order of their rows.
// `row` is below num_rows.
ELLM_DEVICE int32_t find_span(const DeviceStep& step, int32_t row) {
  const int32_t lane = thread_index() % kWarp;
  int32_t begin = 0;
  int32_t count = step.num_spans();
  // Narrows [begin, begin + count) to a 32nd each time: the last lane whose span begins at or
  // before the row.
  while (count > 1) {
    const int32_t stride = (count + kWarp - 1) / kWarp;
    const int32_t probe = lane * stride;
    const bool before = probe < count && step.span(begin + probe).row_begin <= row;
    const int32_t last = at_least(count_bits(ballot(before)), 1) - 1;
    begin += last * stride;
    count = at_most(stride, count - last * stride);
  }
  return begin;
}

// Units of work of one span, or of several together.
struct Work {
  int32_t decode_rows = 0;
  int32_t long_units = 0;   // of decode rows, with parts of kLongPartTokens or more
  int32_t short_units = 0;  // of the others
  int32_t prefill_units = 0;
};

ELLM_HOST_DEVICE Work work_of(const SequenceSpan& span, int32_t window, int32_t most_parts,
                              int32_t block_tokens) {
  Work work;
  if (span.row_count == 1) {
    const Parts parts = parts_of(span.context_tokens, window, most_parts);
    work.decode_rows = 1;
    (parts.tokens >= kLongPartTokens ? work.long_units : work.short_units) = parts.count;
  } else {
    work.prefill_units = static_cast<int32_t>(ceil_div(span.row_count, block_tokens));
  }
  return work;
}

// The sums of what threads before this one contribute, and of all: one block, all threads.
ELLM_DEVICE int32_t sum_before(int32_t value, int32_t* shared, int32_t* all) {
  constexpr int32_t kWarps = kPrepareThreads / kWarp;
  const int32_t lane = thread_index() % kWarp;
  const int32_t warp = thread_index() / kWarp;
  int32_t inclusive = value;
  ELLM_UNROLL
  for (int32_t step = 1; step < kWarp; step *= 2) {
    const int32_t other = shuffle(inclusive, at_least(lane - step, 0));
    if (lane >= step) inclusive += other;
  }
  if (lane == kWarp - 1) shared[warp] = inclusive;
  sync_block();
  int32_t before = inclusive - value;
  *all = 0;
  ELLM_UNROLL
  for (int32_t w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared[w];
    *all += shared[w];
  }
  sync_block();
  return before;
}

// Lists the work, with one block. Each thread takes neighbouring spans. Long units come first: the
// long parts of all rows, and of a span's blocks the last, which sees most tokens.
ELLM_DEVICE void list_work(const AttentionArgs& args) {
  const Workspace& space = args.workspace;
  const int32_t window = args.window[0];
  const int32_t block_tokens = tokens_per_block(kPrefillRows, args.group.value());
  const int32_t spans = args.step.num_spans();
  const int32_t share = (spans + kPrepareThreads - 1) / kPrepareThreads;
  const int32_t begin = at_most(spans, thread_index() * share);
  const int32_t end = at_most(spans, begin + share);
  const auto work_of_span = [&](int32_t i) {
    Work work = work_of(args.step.span(i), window, space.most_parts, block_tokens);
    if (space.decodes_only()) work.prefill_units = 0;  // there is no room for them
    return work;
  };

  Work mine;
  for (int32_t i = begin; i < end; ++i) {
    const Work work = work_of_span(i);
    mine.decode_rows += work.decode_rows;
    mine.long_units += work.long_units;
    mine.short_units += work.short_units;
    mine.prefill_units += work.prefill_units;
  }
  auto* shared = reinterpret_cast<int32_t*>(shared_memory());
  Work all;
  Work at;
  at.decode_rows = sum_before(mine.decode_rows, shared, &all.decode_rows);
  at.long_units = sum_before(mine.long_units, shared, &all.long_units);
  at.short_units = all.long_units + sum_before(mine.short_units, shared, &all.short_units);
  at.prefill_units = sum_before(mine.prefill_units, shared, &all.prefill_units);

  for (int32_t i = begin; i < end; ++i) {
    const Work work = work_of_span(i);
    if (work.decode_rows != 0) space.decode_spans[at.decode_rows] = i;
    for (int32_t part = 0; part < work.long_units; ++part) {
      space.decode_units[at.long_units + part] = {at.decode_rows, part};
    }
    for (int32_t part = 0; part < work.short_units; ++part) {
      space.decode_units[at.short_units + part] = {at.decode_rows, part};
    }
    for (int32_t block = 0; block < work.prefill_units; ++block) {
      space.prefill_units[at.prefill_units + block] = {i, work.prefill_units - 1 - block};
    }
    at.decode_rows += work.decode_rows;
    at.long_units += work.long_units;
    at.short_units += work.short_units;
    at.prefill_units += work.prefill_units;
  }
  const int32_t arrivals = all.decode_rows * args.q_heads;
  for (int32_t i = thread_index(); i < arrivals; i += kPrepareThreads) space.arrivals[i] = 0;
  if (thread_index() == 0) {
    *space.header = {all.long_units + all.short_units, all.prefill_units, 0, 0};
  }
}

// Sets every byte of a row of the result: one block.
template <class T>
ELLM_DEVICE void fill_row(const AttentionArgs& args, int32_t row, int32_t byte) {
  T value;
  memset(&value, byte, sizeof value);
  const int32_t vectors =
      static_cast<int32_t>(args.q_heads * args.kv.row_bytes / int64_t{sizeof(T)});
  T* out = static_cast<T*>(args.out) + int64_t{row} * vectors;
  for (int32_t i = thread_index(); i < vectors; i += kPrepareThreads) out[i] = value;
}

// K and V of one row, or zeros for its result if no sequence uses it: one block.
template <class T>
ELLM_DEVICE void prepare_row(const AttentionArgs& args, int32_t row) {
  const int32_t head_vectors = static_cast<int32_t>(args.kv.row_bytes / int64_t{sizeof(T)});
  if (row >= args.step.num_rows()) {
    fill_row<T>(args, row, 0);
    return;
  }
  const SequenceSpan span = args.step.span(find_span(args.step, row));
  // The host refuses such a step. If one gets here all the same, its rows are NaN, not whatever
  // lay in the memory.
  if (args.workspace.header != nullptr && args.workspace.decodes_only() && span.row_count > 1) {
    fill_row<T>(args, row, 0xff);
  }
  const int64_t token = args.kv.token(span.context_tokens + row - span.row_begin);
  const int32_t layer = args.layer[0];
  const int32_t vectors = args.kv.kv_heads * head_vectors;
  const T* k = static_cast<const T*>(args.k) + int64_t{row} * vectors;
  const T* v = static_cast<const T*>(args.v) + int64_t{row} * vectors;
  for (int32_t i = thread_index(); i < vectors; i += kPrepareThreads) {
    const T key = k[i];
    const T value = v[i];
    const int32_t head = i / head_vectors;
    const int64_t at = token + (i - head * head_vectors) * int64_t{sizeof(T)};
    *reinterpret_cast<T*>(args.kv.head(span.slot, layer, 0, head) + at) = key;
    *reinterpret_cast<T*>(args.kv.head(span.slot, layer, 1, head) + at) = value;
  }
}

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

// The first block lists the work, if there is a workspace for it, and counts the epoch; each of the
// others takes a row. T: a type that divides the bytes of a head.
template <class T>
ELLM_KERNEL void ELLM_LAUNCH_BOUNDS(kPrepareThreads, 1) prepare(const AttentionArgs args) {
  if (block_index() > 0) {
    prepare_row<T>(args, block_index() - 1);
    return;
  }
  if (thread_index() == 0) args.epoch_out[0] = args.epoch[0] + 1;
  if (args.workspace.header != nullptr) list_work(args);
}

inline int64_t prepare_blocks(int64_t rows) { return 1 + rows; }
constexpr int64_t kPrepareSharedBytes = kPrepareThreads / kWarp * sizeof(int32_t);

}  // namespace ellm::cuda
