// The first words of the int32 metadata of a step, as ellm_jax/runtime/batch.py writes them.
#pragma once

#include <cstdint>

namespace ellm {

struct StepHeader {
  int32_t kv_id;          // registry id of the KvCache; 0: the step touches no memory
  int32_t num_sequences;  // spans in use
  int32_t num_rows;       // token rows in use; the rest is padding
  int32_t spans_offset;   // int32 words from the start of the metadata to the first span
};

}  // namespace ellm
