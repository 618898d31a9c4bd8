// What native code reads of the int32 metadata of a step, as ellm_jax/runtime/batch.py writes it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/status.h"

namespace ellm {

class KvCache;

// The first words.
struct StepHeader {
  int32_t kv_id;          // registry id of the KvCache; 0: the step touches no memory
  int32_t num_sequences;  // spans in use
  int32_t num_rows;       // token rows in use; the rest is padding
  int32_t spans_offset;   // int32 words from the start of the metadata to the first span
};

// One sequence of a ragged batch.
struct SequenceSpan {
  int32_t slot;
  int32_t context_tokens;  // tokens already in the slot before this step
  int32_t row_begin;       // first row of q, k, v
  int32_t row_count;       // new tokens of this step
};

// The parts of metadata of `words` words, which outlives them.
struct StepView {
  StepHeader header;
  const SequenceSpan* spans;  // header.num_sequences
};

// Errors: kInvalid where the metadata is too short for what it says.
Result<StepView> view_step(const int32_t* metadata, size_t words);

// Whether every span is inside the batch, and what it reads and writes is mapped in its slot.
// Errors: kInvalid (rows, slot), kNotMapped.
Status check_step(const KvCache& kv, const StepView& step);

}  // namespace ellm
