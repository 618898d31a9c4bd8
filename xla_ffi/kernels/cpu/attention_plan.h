// How the attention of a step is divided into units for the threads. Any division gives the same
// bits, so this is about time alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace ellm {

struct AttentionPlan {
  // Some parts of a unit's context; their states begin at number `state` among all.
  struct Piece {
    AttentionUnit unit;
    int64_t state;
  };

  std::vector<AttentionUnit> whole;  // done at once
  std::vector<Piece> pieces;         // of the units in `divided`
  std::vector<Piece> divided;        // merged when all pieces are done
  int64_t num_states = 0;
  int64_t unit_rows = 0;  // of the largest of all units
};

class AttentionPlanner {
 public:
  AttentionPlanner(const AttentionArgs& args, const SequenceSpan* spans, int64_t num_spans,
                   int64_t num_threads)
      : args_(args), spans_(spans), num_spans_(num_spans), num_threads_(num_threads) {}

  AttentionPlan plan() const {
    AttentionPlan plan;
    const std::vector<AttentionUnit> units = all_units();
    int64_t all_parts = 0;
    for (const AttentionUnit& unit : units) all_parts += parts_of(unit);
    const int64_t most_parts = std::max<int64_t>(1, all_parts / (kUnitsPerThread * num_threads_));
    const bool few = static_cast<int64_t>(units.size()) < 2 * num_threads_;
    for (const AttentionUnit& unit : units) {
      plan.unit_rows = std::max(plan.unit_rows, rows_of(unit));
      const bool divides = few || unit.token_end - unit.token_begin == 1;
      const int64_t count = divides ? divide_up(parts_of(unit), most_parts) : 1;
      if (num_threads_ == 1 || count == 1) {
        plan.whole.push_back(unit);
      } else {
        divide(unit, count, &plan);
      }
    }
    return plan;
  }

  int64_t rows_of(const AttentionUnit& unit) const {
    return (unit.head_end - unit.head_begin) * (unit.token_end - unit.token_begin) * group();
  }

 private:
  // Query rows that share each packed block of K and V: many, so that packing costs little, but
  // fewer where there would be no more than a few units for each thread. Multiples of the heights
  // of all panels.
  static constexpr int64_t kRowsPerUnit = 192;
  static constexpr int64_t kFewRowsPerUnit = 48;
  static constexpr int64_t kUnitsPerThread = 8;

  static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
  static int64_t parts_of(const AttentionUnit& unit) { return unit.part_end - unit.part_begin; }
  int64_t group() const { return args_.q_heads / args_.kv.kv_heads; }

  int64_t tokens_per_unit() const {
    int64_t rows = 0;
    for (int64_t s = 0; s < num_spans_; ++s) rows += spans_[s].row_count;
    int64_t unit_rows = kRowsPerUnit;
    while (unit_rows > kFewRowsPerUnit &&
           rows * args_.q_heads < unit_rows * kUnitsPerThread * num_threads_) {
      unit_rows /= 2;
    }
    return std::max<int64_t>(1, unit_rows / group());
  }

  // KV heads in a unit of one token. Such units are bound by memory, and the tiles of all heads are
  // neighbours in it; but with too few units heads are dealt out.
  int64_t heads_together() const {
    int64_t parts = 0;
    for (int64_t s = 0; s < num_spans_; ++s) {
      if (spans_[s].row_count > 1) continue;
      parts += divide_up(spans_[s].context_tokens + 1, args_.part_tokens);
    }
    const int64_t wanted = kUnitsPerThread / 2 * num_threads_;
    int64_t heads = args_.kv.kv_heads;
    while (heads > 1 && parts * divide_up(args_.kv.kv_heads, heads) < wanted) {
      heads = divide_up(heads, 2);
    }
    return heads;
  }

  std::vector<AttentionUnit> all_units() const {
    const int64_t block = tokens_per_unit();
    const int64_t together = heads_together();
    std::vector<AttentionUnit> units;
    for (int64_t s = 0; s < num_spans_; ++s) {
      const SequenceSpan& span = spans_[s];
      const int64_t heads = span.row_count == 1 ? together : 1;
      for (int64_t t = 0; t < span.row_count; t += block) {
        const int64_t end = std::min<int64_t>(span.row_count, t + block);
        const int64_t first = span.context_tokens + t;
        const int64_t seen = args_.window > 0 ? std::max<int64_t>(0, first + 1 - args_.window) : 0;
        for (int64_t h = 0; h < args_.kv.kv_heads; h += heads) {
          units.push_back({span, h, std::min(args_.kv.kv_heads, h + heads), t, end,
                           seen / args_.part_tokens,
                           divide_up(span.context_tokens + end, args_.part_tokens)});
        }
      }
    }
    return units;
  }

  void divide(const AttentionUnit& unit, int64_t count, AttentionPlan* plan) const {
    const int64_t parts = parts_of(unit);
    plan->divided.push_back({unit, plan->num_states});
    for (int64_t i = 0; i < count; ++i) {
      const int64_t begin = i * parts / count;
      AttentionUnit piece = unit;
      piece.part_begin = unit.part_begin + begin;
      piece.part_end = unit.part_begin + (i + 1) * parts / count;
      plan->pieces.push_back({piece, plan->num_states + begin});
    }
    plan->num_states += parts;
  }

  const AttentionArgs& args_;
  const SequenceSpan* const spans_;
  const int64_t num_spans_;
  const int64_t num_threads_;
};

}  // namespace ellm
