#include "kv/step.h"

#include <cstring>
#include <string>

#include "kv/kv_cache.h"

namespace ellm {

Result<StepView> view_step(const int32_t* metadata, size_t words) {
  StepView step;
  if (words < sizeof step.header / sizeof(int32_t)) {
    return Status(Code::kInvalid, "metadata of " + std::to_string(words) +
                                      " words is too short for a header; pack it with StepLayout");
  }
  std::memcpy(&step.header, metadata, sizeof step.header);
  const StepHeader& header = step.header;
  const int64_t end =
      header.spans_offset + int64_t{header.num_sequences} * sizeof(SequenceSpan) / sizeof(int32_t);
  if (header.num_sequences < 0 || header.num_rows < 0 || header.spans_offset < 0 ||
      end > static_cast<int64_t>(words)) {
    return Status(Code::kInvalid, "metadata of " + std::to_string(words) + " words does not hold " +
                                      std::to_string(header.num_sequences) + " sequences with " +
                                      std::to_string(header.num_rows) + " rows from word " +
                                      std::to_string(header.spans_offset) +
                                      " on; pack it with StepLayout");
  }
  step.spans = reinterpret_cast<const SequenceSpan*>(metadata + header.spans_offset);
  return step;
}

Status check_step(const KvCache& kv, const StepView& step) {
  for (int32_t i = 0; i < step.header.num_sequences; ++i) {
    const SequenceSpan& s = step.spans[i];
    if (s.row_begin < 0 || s.row_count < 0 || s.context_tokens < 0 ||
        int64_t{s.row_begin} + s.row_count > step.header.num_rows) {
      return Status(Code::kInvalid,
                    "sequence " + std::to_string(i) + " takes rows " + std::to_string(s.row_begin) +
                        " to " + std::to_string(int64_t{s.row_begin} + s.row_count) + " after " +
                        std::to_string(s.context_tokens) + " tokens, the step has " +
                        std::to_string(step.header.num_rows) + " rows");
    }
    if (s.slot < 0 || s.slot >= kv.layout().num_slots) {
      return Status(Code::kInvalid, "sequence " + std::to_string(i) + " names slot " +
                                        std::to_string(s.slot) + ", the KV cache has slots 0 to " +
                                        std::to_string(kv.layout().num_slots - 1));
    }
    const int64_t end = int64_t{s.context_tokens} + s.row_count;
    const int64_t mapped = kv.mapped_tokens(s.slot);
    if (end > mapped) {
      return Status(Code::kNotMapped, "slot " + std::to_string(s.slot) + " is to hold tokens " +
                                          std::to_string(s.context_tokens) + " to " +
                                          std::to_string(end) + " but only " +
                                          std::to_string(mapped) +
                                          " tokens are mapped; extend the slot before the step");
    }
  }
  return Status::Ok();
}

}  // namespace ellm
