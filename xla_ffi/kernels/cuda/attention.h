// Attention over virtual KV on a GPU. Needs no CUDA header.
#pragma once

#include "kernels/cuda/attention_args.h"
#include "memory/status.h"

struct CUstream_st;

namespace ellm::cuda {

// Writes the step's K and V into their slots, attends, and clears the rows that no sequence uses.
// Where `shape` has no more rows than sequences, each sequence has to have one row: those of
// another become NaN (but for float32, and head sizes that the tensor core kernels do not take).
// `args.workspace` is that of `shape`. Only enqueues kernels on `stream` of the current device: no
// allocation, no wait, so that it can be captured in a graph.
// Errors: kDriver (the runtime refused a launch), kInvalid (a head size above kMostHeadDim, or a
// device that the kernels do not fit).
Status attention(const AttentionShape& shape, const AttentionArgs& args, CUstream_st* stream);

// Makes the kernels of such calls ready on a device, which a capture could not do, and leaves the
// current device as it was. Errors: as attention().
Status load_attention(const AttentionShape& shape, int32_t device);

}  // namespace ellm::cuda
