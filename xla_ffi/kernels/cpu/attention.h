// Writes the K and V of a step's new tokens into their slots and attends to the slots' contents,
// over all threads.
#pragma once

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/workspace.h"

namespace ellm {

// Tokens after which the online softmax starts afresh: what lets the context of one long sequence
// be divided among threads. Part of the arithmetic, so one constant and no option.
constexpr int64_t kPartTokens = 1024;

// Copies rows [row_begin, row_begin + row_count) of k and v, [rows, kv_heads, head_dim] of
// args.type, to the tokens from context_tokens on of every span's slot, as int8 and scales where
// args.kv has them (Int8Kernels::quantize). The memory has to be mapped.
void write_kv(const AttentionArgs& args, const void* k, const void* v, const SequenceSpan* spans,
              int64_t num_spans, const ParallelFor& parallel);

// args.out for all rows of the spans, after their K and V are written. The partial results of
// divided contexts lie in memory from `workspaces`, or the heap where that is null or short.
void attention(const Kernels& kernels, const AttentionArgs& args, const SequenceSpan* spans,
               int64_t num_spans, int64_t num_threads, const ParallelFor& parallel,
               WorkspaceSource* workspaces = nullptr);

}  // namespace ellm
