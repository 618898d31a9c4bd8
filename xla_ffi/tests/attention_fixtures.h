// Sequences that run through the attention kernels over poisoned KV slots, and the same attention
// in float64.
#pragma once

#include "check.h"
#include "kernel_fixtures.h"
#include "kernels/cpu/attention.h"

namespace ellm {

struct Shape {
  ElementType type = ElementType::kFloat32;
  bool scaled = false;  // K and V are held in int8, each row with a scale
  int64_t kv_heads = 2;
  int64_t group = 2;  // query heads of a KV head
  int64_t head_dim = 64;
  int64_t tile = 16;
  int64_t window = 0;
  float soft_cap = 0.0f;
  int64_t parts = 0;  // tokens of a part; 0: what the engine takes

  int64_t q_heads() const { return kv_heads * group; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
  int64_t kv_row() const { return kv_heads * head_dim; }
  int64_t q_row() const { return q_heads() * head_dim; }
};

inline std::ostream& operator<<(std::ostream& text, const Shape& s) {
  return text << type_name(s.type) << (s.scaled ? " int8 KV" : "") << " kv_heads " << s.kv_heads
              << " group " << s.group << " head_dim " << s.head_dim << " tile " << s.tile
              << " window " << s.window << " soft_cap " << s.soft_cap << " parts " << s.parts;
}

// q, k and v of all tokens of a sequence.
struct Sequence {
  int64_t tokens;
  Elements q, k, v;

  Sequence(const Shape& s, int64_t tokens, std::mt19937_64* random)
      : tokens(tokens),
        q(random_elements(s.type, tokens * s.q_row(), random, 2.0f)),
        k(random_elements(s.type, tokens * s.kv_row(), random)),
        v(random_elements(s.type, tokens * s.kv_row(), random)) {}
};

// The values and scales of rows of `dim` elements, as the definition says: scale = max |x| / 127,
// value = x / scale to the nearest, ties to even.
struct Int8 {
  std::vector<int8_t> values;
  std::vector<float> scales;

  Int8(const Elements& x, int64_t dim) : values(x.size()) {
    for (size_t begin = 0; begin < x.size(); begin += dim) {
      float largest = 0.0f;
      for (int64_t d = 0; d < dim; ++d) largest = std::max(largest, std::fabs(x.get(begin + d)));
      scales.push_back(largest / 127.0f);
      for (int64_t d = 0; d < dim && largest > 0.0f; ++d) {
        values[begin + d] = static_cast<int8_t>(std::nearbyint(x.get(begin + d) / scales.back()));
      }
    }
  }
};

// K and V as attention finds them: what they are worth in int8, where they are held so.
inline Sequence as_held(const Shape& s, const Sequence& sequence) {
  Sequence held = sequence;
  if (!s.scaled) return held;
  for (Elements* side : {&held.k, &held.v}) {
    const Int8 rows(*side, s.head_dim);
    *side = Elements(ElementType::kFloat32, rows.values.size());
    for (size_t i = 0; i < rows.values.size(); ++i) {
      side->set(i, rows.values[i] * rows.scales[i / s.head_dim]);
    }
  }
  return held;
}

struct Exact {
  std::vector<double> row;   // sum of weight * V
  std::vector<double> size;  // sum of weight * |V|: what errors of the weights are relative to
};

// Result row of head `head` of the token at `position`, in float64.
inline Exact attend_float64(const Shape& s, const Sequence& sequence, int64_t position,
                            int64_t head) {
  const int64_t kv_head = head / s.group;
  const int64_t first = s.window > 0 ? std::max<int64_t>(0, position + 1 - s.window) : 0;
  std::vector<double> scores;
  double max = -std::numeric_limits<double>::infinity();
  for (int64_t t = first; t <= position; ++t) {
    double score = 0;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      score += double{sequence.q.get(position * s.q_row() + head * s.head_dim + d)} *
               sequence.k.get(t * s.kv_row() + kv_head * s.head_dim + d);
    }
    score /= std::sqrt(static_cast<double>(s.head_dim));
    if (s.soft_cap > 0) score = s.soft_cap * std::tanh(score / s.soft_cap);
    scores.push_back(score);
    max = std::max(max, score);
  }
  double sum = 0;
  Exact out = {std::vector<double>(s.head_dim), std::vector<double>(s.head_dim)};
  for (size_t i = 0; i < scores.size(); ++i) {
    const double weight = std::exp(scores[i] - max);
    sum += weight;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      const double v = sequence.v.get((first + i) * s.kv_row() + kv_head * s.head_dim + d);
      out.row[d] += weight * v;
      out.size[d] += weight * std::fabs(v);
    }
  }
  for (double& x : out.row) x /= sum;
  for (double& x : out.size) x /= sum;
  return out;
}

// The next `count` tokens of sequence `index`.
struct Step {
  int64_t index;
  int64_t count;
};

// The slots of some sequences and the result rows of all their tokens so far. Memory that no step
// wrote is NaN.
class Runner {
 public:
  Runner(const Kernels& kernels, const Shape& shape, const std::vector<Sequence>& sequences)
      : kernels_(kernels), shape_(shape), sequences_(sequences), done_(sequences.size()) {
    int64_t longest = 1;
    for (const Sequence& s : sequences) {
      longest = std::max(longest, s.tokens);
      results_.emplace_back(shape.type, s.tokens * shape.q_row());
    }
    layout_.layers = 2;
    layout_.kv_heads = shape.kv_heads;
    layout_.head_dim = shape.head_dim;
    layout_.element_bytes = shape.scaled ? 1 : element_bytes(shape.type);
    layout_.scale_bytes = shape.scaled ? 4 : 0;
    layout_.tile_tokens = shape.tile;
    layout_.chunk_bytes = 4096;
    while (layout_.chunk_bytes < layout_.tile_bytes()) layout_.chunk_bytes *= 2;
    layout_.max_tokens = longest;
    layout_.slot_bytes = layout_.chunks_for(longest) * layout_.chunk_bytes;
    layout_.num_slots = static_cast<int64_t>(sequences.size());
    memory_ = Elements(shape.type, layout_.reserved_bytes() / element_bytes(shape.type));
  }

  // Runs the steps as one batch: writes K and V and, unless `only_write`, attends.
  void batch(const std::vector<Step>& steps, int64_t num_threads = 1,
             const ParallelFor& parallel = run_serially, bool only_write = false) {
    constexpr int64_t kRowsBehind = 2;  // rows of the step that no sequence uses
    std::vector<SequenceSpan> spans;
    int64_t rows = 0;
    for (const Step& step : steps) {
      spans.push_back({slot(step.index), static_cast<int32_t>(done_[step.index]),
                       static_cast<int32_t>(rows), static_cast<int32_t>(step.count)});
      rows += step.count;
    }
    Elements q(shape_.type, rows * shape_.q_row()), k(shape_.type, rows * shape_.kv_row()),
        v(shape_.type, rows * shape_.kv_row());
    Elements out(shape_.type, (rows + kRowsBehind) * shape_.q_row());
    const Elements poison = out;
    for (size_t i = 0; i < steps.size(); ++i) {
      const Sequence& from = sequences_[steps[i].index];
      const int64_t token = spans[i].context_tokens;
      const int64_t row = spans[i].row_begin;
      const int64_t count = steps[i].count;
      q.copy(row * shape_.q_row(), from.q, token * shape_.q_row(), count * shape_.q_row());
      k.copy(row * shape_.kv_row(), from.k, token * shape_.kv_row(), count * shape_.kv_row());
      v.copy(row * shape_.kv_row(), from.v, token * shape_.kv_row(), count * shape_.kv_row());
    }
    AttentionArgs args;
    args.q = q.at(0);
    args.out = out.at(0);
    args.type = shape_.type;
    args.q_heads = shape_.q_heads();
    args.kv = layout_;
    args.kv_base = memory_.at(0);
    args.layer = kLayer;
    args.window = shape_.window;
    args.scale = shape_.scale();
    args.soft_cap = shape_.soft_cap;
    args.part_tokens = shape_.parts > 0 ? shape_.parts : kPartTokens;
    const int64_t num_spans = static_cast<int64_t>(spans.size());
    write_kv(args, k.at(0), v.at(0), spans.data(), num_spans, parallel);
    if (!only_write) attention(kernels_, args, spans.data(), num_spans, num_threads, parallel);
    for (size_t i = 0; i < steps.size(); ++i) {
      results_[steps[i].index].copy(done_[steps[i].index] * shape_.q_row(), out,
                                    spans[i].row_begin * shape_.q_row(),
                                    steps[i].count * shape_.q_row());
      done_[steps[i].index] += steps[i].count;
    }
    CHECK(out.same(rows * shape_.q_row(), poison, 0, kRowsBehind * shape_.q_row()));
  }

  // Writes the first `tokens` tokens of a sequence without attending.
  void history(int64_t index, int64_t tokens) { batch({{index, tokens}}, 1, run_serially, true); }

  const Elements& result(int64_t index) const { return results_[index]; }
  const KvLayout& layout() const { return layout_; }
  const Elements& memory() const { return memory_; }
  // Slots are given out backwards, so that a slot is no row and no sequence number.
  int32_t slot(int64_t index) const {
    return static_cast<int32_t>(static_cast<int64_t>(sequences_.size()) - 1 - index);
  }

  static constexpr int64_t kLayer = 1;

 private:
  const Kernels& kernels_;
  const Shape shape_;
  const std::vector<Sequence>& sequences_;
  std::vector<int64_t> done_;
  std::vector<Elements> results_;
  KvLayout layout_;
  Elements memory_;
};

}  // namespace ellm
