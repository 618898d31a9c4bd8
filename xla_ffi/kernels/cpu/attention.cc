#include "kernels/cpu/attention.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/scratch.h"

namespace ellm {

namespace {

// Query rows that share each packed block of K and V: many, so that packing costs little, but fewer
// where there would be no more than a few units for each thread. Multiples of the heights of all
// panels.
constexpr int64_t kRowsPerUnit = 192;
constexpr int64_t kFewRowsPerUnit = 48;
constexpr int64_t kUnitsPerThread = 8;
// Bytes of K and V below which a copy is not worth handing out.
constexpr int64_t kSerialCopyBytes = 256 * 1024;

struct PartialUnit {
  AttentionUnit unit;
  int64_t state;  // index of its first part among all partial states
};

}  // namespace

void write_kv(const AttentionArgs& a, const void* k, const void* v, const SequenceSpan* spans,
              int64_t num_spans, const ParallelFor& parallel) {
  const int64_t row_bytes = a.kv.head_dim * element_bytes(a.type);
  int64_t rows = 0;
  for (int64_t s = 0; s < num_spans; ++s) rows += spans[s].row_count;
  const auto write = [&](int64_t s) {
    const SequenceSpan& span = spans[s];
    for (int64_t t = 0; t < span.row_count; ++t) {
      char* slot = a.kv_base + span.slot * a.kv.slot_bytes;
      const int64_t token = span.context_tokens + t;
      const int64_t from = (span.row_begin + t) * a.kv.kv_heads * row_bytes;
      for (int64_t h = 0; h < a.kv.kv_heads; ++h) {
        std::memcpy(slot + a.kv.offset_bytes(a.layer, 0, h, token),
                    static_cast<const char*>(k) + from + h * row_bytes, row_bytes);
        std::memcpy(slot + a.kv.offset_bytes(a.layer, 1, h, token),
                    static_cast<const char*>(v) + from + h * row_bytes, row_bytes);
      }
    }
  };
  if (rows * 2 * a.kv.kv_heads * row_bytes <= kSerialCopyBytes) {
    run_serially(num_spans, write);
  } else {
    parallel(num_spans, write);
  }
}

void attention(const Kernels& kernels, const AttentionArgs& a, const SequenceSpan* spans,
               int64_t num_spans, int64_t num_threads, const ParallelFor& parallel,
               WorkspaceSource* workspaces) {
  const int64_t group = a.q_heads / a.kv.kv_heads;
  int64_t rows = 0;
  for (int64_t s = 0; s < num_spans; ++s) rows += spans[s].row_count;
  int64_t unit_rows = kRowsPerUnit;
  while (unit_rows > kFewRowsPerUnit &&
         rows * a.q_heads < unit_rows * kUnitsPerThread * num_threads) {
    unit_rows /= 2;
  }
  const int64_t block = std::max<int64_t>(1, unit_rows / group);
  std::vector<AttentionUnit> whole;
  for (int64_t s = 0; s < num_spans; ++s) {
    const SequenceSpan& span = spans[s];
    for (int64_t t = 0; t < span.row_count; t += block) {
      const int64_t end = std::min<int64_t>(span.row_count, t + block);
      const int64_t first = span.context_tokens + t;
      const int64_t seen = a.window > 0 ? std::max<int64_t>(0, first + 1 - a.window) : 0;
      for (int64_t h = 0; h < a.kv.kv_heads; ++h) {
        whole.push_back({span, h, t, end, seen / a.part_tokens,
                         (span.context_tokens + end + a.part_tokens - 1) / a.part_tokens});
      }
    }
  }

  // Enough units for the threads: each is done by one. Else the parts of long contexts are units
  // of their own, and a second pass merges them in order; the result is the same to the bit.
  std::vector<PartialUnit> divided;
  std::vector<AttentionUnit> parts;
  if (static_cast<int64_t>(whole.size()) < 2 * num_threads) {
    std::vector<AttentionUnit> rest;
    for (const AttentionUnit& unit : whole) {
      if (unit.part_end - unit.part_begin < 2) {
        rest.push_back(unit);
        continue;
      }
      divided.push_back({unit, static_cast<int64_t>(parts.size())});
      for (int64_t p = unit.part_begin; p < unit.part_end; ++p) {
        parts.push_back(unit);
        parts.back().part_begin = p;
        parts.back().part_end = p + 1;
      }
    }
    whole.swap(rest);
  }

  int64_t part_rows = 0;
  for (const AttentionUnit& unit : parts) {
    part_rows = std::max(part_rows, (unit.token_end - unit.token_begin) * group);
  }
  const int64_t stride = kernels.acc_stride(a.kv.head_dim);
  const int64_t state_floats = part_rows * (stride + 2);
  const WorkspaceMemory memory(workspaces, parts.size() * state_floats * sizeof(float));
  std::vector<SoftmaxState> states(parts.size());
  for (size_t i = 0; i < parts.size(); ++i) {
    float* at = static_cast<float*>(memory.get()) + i * state_floats;
    states[i] = {at + part_rows * stride, at + part_rows * (stride + 1), at};
  }

  const int64_t scratch_floats = kernels.attend_scratch_floats(a, block * group);
  const int64_t num_parts = static_cast<int64_t>(parts.size());
  // Blocks late in a prompt see most tokens: taken first, they leave short ones for the end.
  parallel(num_parts + static_cast<int64_t>(whole.size()), [&](int64_t i) {
    float* scratch = Scratch::floats(scratch_floats);
    if (i < num_parts) {
      kernels.attend(a, parts[i], scratch, &states[i]);
    } else {
      kernels.attend(a, whole[whole.size() - 1 - (i - num_parts)], scratch, nullptr);
    }
  });
  if (divided.empty()) return;
  parallel(static_cast<int64_t>(divided.size()), [&](int64_t i) {
    kernels.merge(a, divided[i].unit, states.data() + divided[i].state,
                  Scratch::floats(scratch_floats));
  });
}

}  // namespace ellm
