// Attention on the emulated GPU: sequences in poisoned slots of which only the needed part is
// mapped, and the same attention in float64.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "kernels/cuda/launch.h"

namespace ellm::cuda {

struct Shape {
  Element element = Element::kBFloat16;
  int32_t kv_heads = 2;
  int32_t group = 2;  // query heads of a KV head
  int32_t head_dim = 64;
  int32_t tile = 16;
  int32_t window = 0;
  float soft_cap = 0.0f;

  int32_t q_heads() const { return kv_heads * group; }
  int64_t q_row() const { return int64_t{q_heads()} * head_dim; }
  int64_t kv_row() const { return int64_t{kv_heads} * head_dim; }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(head_dim)); }
};

inline std::ostream& operator<<(std::ostream& text, const Shape& s) {
  const char* names[] = {"float32", "bfloat16", "float16"};
  return text << names[static_cast<int>(s.element)] << " kv_heads " << s.kv_heads << " group "
              << s.group << " head_dim " << s.head_dim << " tile " << s.tile << " window "
              << s.window << " soft_cap " << s.soft_cap;
}

// Values of an element type. Memory that nobody wrote is NaN.
class Values {
 public:
  Values(Element element, int64_t count)
      : element_(element), bytes_(count * element_bytes(element), static_cast<char>(0xff)) {}

  static Values random(Element element, int64_t count, float size, std::mt19937_64* random) {
    std::normal_distribution<float> normal(0.0f, size);
    Values values(element, count);
    for (int64_t i = 0; i < count; ++i) values.set(i, normal(*random));
    return values;
  }

  float get(int64_t i) const { return read(element_, bytes_.data() + i * size()); }
  void set(int64_t i, float x) {
    if (element_ == Element::kFloat32) {
      std::memcpy(at(i), &x, sizeof x);
      return;
    }
    const uint16_t bits =
        element_ == Element::kBFloat16 ? emulator::float_to_brain(x) : emulator::float_to_half(x);
    std::memcpy(at(i), &bits, sizeof bits);
  }
  void copy(int64_t to, const Values& from, int64_t begin, int64_t count) {
    std::memcpy(at(to), from.bytes_.data() + begin * size(), count * size());
  }
  bool same(int64_t i, const Values& other, int64_t j, int64_t count) const {
    return std::memcmp(bytes_.data() + i * size(), other.bytes_.data() + j * size(),
                       count * size()) == 0;
  }
  char* at(int64_t i) { return bytes_.data() + i * size(); }
  const char* at(int64_t i) const { return bytes_.data() + i * size(); }
  int64_t size() const { return element_bytes(element_); }

  static float read(Element element, const char* from) {
    if (element == Element::kFloat32) {
      float x;
      std::memcpy(&x, from, sizeof x);
      return x;
    }
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return element == Element::kBFloat16 ? emulator::brain_to_float(bits)
                                         : emulator::half_to_float(bits);
  }

 private:
  Element element_;
  std::vector<char> bytes_;
};

// q, k and v of all tokens of a sequence.
struct Sequence {
  int64_t tokens;
  Values q, k, v;

  Sequence(const Shape& s, int64_t tokens, std::mt19937_64* random)
      : tokens(tokens),
        q(Values::random(s.element, tokens * s.q_row(), 2.0f, random)),
        k(Values::random(s.element, tokens * s.kv_row(), 1.0f, random)),
        v(Values::random(s.element, tokens * s.kv_row(), 1.0f, random)) {}
};

// Result row of query head `head` of the token at `position`, in float64.
inline std::vector<double> attend_float64(const Shape& s, const Sequence& sequence,
                                          int64_t position, int64_t head) {
  const int64_t kv_head = head / s.group;
  const int64_t first = s.window > 0 ? std::max<int64_t>(0, position + 1 - s.window) : 0;
  std::vector<double> scores;
  for (int64_t t = first; t <= position; ++t) {
    double score = 0;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      score += double{sequence.q.get(position * s.q_row() + head * s.head_dim + d)} *
               sequence.k.get(t * s.kv_row() + kv_head * s.head_dim + d);
    }
    score /= std::sqrt(static_cast<double>(s.head_dim));
    if (s.soft_cap > 0) score = s.soft_cap * std::tanh(score / s.soft_cap);
    scores.push_back(score);
  }
  const double high = *std::max_element(scores.begin(), scores.end());
  std::vector<double> row(s.head_dim);
  double sum = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    const double weight = std::exp(scores[i] - high);
    sum += weight;
    for (int64_t d = 0; d < s.head_dim; ++d) {
      row[d] += weight * sequence.v.get((first + i) * s.kv_row() + kv_head * s.head_dim + d);
    }
  }
  for (double& x : row) x /= sum;
  return row;
}

// Launches kernels on the emulator; few blocks at a time, so that they take several units each.
struct EmulatedLauncher {
  emulator::Timing timing;
  bool hopper = false;
  int64_t resident_blocks = 3;

  bool has_warpgroup_products() const { return hopper; }

  template <auto kKernel>
  Status launch(const LaunchShape& shape, const AttentionArgs& args) {
    const int64_t blocks =
        shape.persistent ? std::min(shape.blocks, resident_blocks) : shape.blocks;
    emulator::run(blocks, shape.threads, shape.shared_bytes, timing, [&] { kKernel(args); });
    return Status::Ok();
  }
};

// The next `count` tokens of sequence `index`.
struct Step {
  int64_t index;
  int64_t count;
};

// The slots of some sequences, and the result rows of the tokens that were computed. Any access to
// memory past the tiles that hold tokens is a fault.
class EmulatedGpu {
 public:
  EmulatedGpu(const Shape& shape, const std::vector<Sequence>& sequences,
              EmulatedLauncher launcher = {})
      : shape_(shape), sequences_(sequences), done_(sequences.size()), launcher_(launcher) {
    int64_t longest = 1;
    for (const Sequence& s : sequences) {
      longest = std::max(longest, s.tokens);
      results_.emplace_back(shape.element, s.tokens * shape.q_row());
    }
    layout_.layers = 2;
    layout_.kv_heads = shape.kv_heads;
    layout_.head_dim = shape.head_dim;
    layout_.element_bytes = element_bytes(shape.element);
    layout_.tile_tokens = shape.tile;
    layout_.chunk_bytes = 4096;
    while (layout_.chunk_bytes < shape.tile * layout_.token_bytes()) layout_.chunk_bytes *= 2;
    layout_.max_tokens = longest;
    layout_.slot_bytes = layout_.chunks_for(longest) * layout_.chunk_bytes;
    layout_.num_slots = static_cast<int64_t>(sequences.size());
    void* base = mmap(nullptr, layout_.reserved_bytes(), PROT_NONE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(base != MAP_FAILED);
    base_ = static_cast<char*>(base);
  }
  ~EmulatedGpu() { munmap(base_, layout_.reserved_bytes()); }
  EmulatedGpu(const EmulatedGpu&) = delete;
  EmulatedGpu& operator=(const EmulatedGpu&) = delete;

  // Puts the first `tokens` tokens of a sequence into its slot without the kernels.
  void history(int64_t index, int64_t tokens) {
    map(index, tokens);
    for (int64_t t = done_[index]; t < tokens; ++t) {
      for (int64_t head = 0; head < shape_.kv_heads; ++head) {
        const int64_t from = t * shape_.kv_row() + head * shape_.head_dim;
        std::memcpy(at(index, 0, head, t), sequences_[index].k.at(from), row_bytes());
        std::memcpy(at(index, 1, head, t), sequences_[index].v.at(from), row_bytes());
      }
    }
    done_[index] = tokens;
  }

  // Runs the steps as one batch of `sequences` at most, in a bucket with more rows than they need.
  // The memory of the result holds `before`.
  void batch(const std::vector<Step>& steps, int64_t sequences = 0, float before = NAN) {
    constexpr int64_t kRowsBehind = 3;
    std::vector<int32_t> meta(8);
    int64_t used = 0;
    for (const Step& step : steps) {
      map(step.index, done_[step.index] + step.count);
      for (const int64_t word : {slot(step.index), done_[step.index], used, step.count}) {
        meta.push_back(static_cast<int32_t>(word));
      }
      used += step.count;
    }
    const int64_t rows = used + (steps.size() == 1 && used == 1 ? 0 : kRowsBehind);
    const int32_t header[] = {1, static_cast<int32_t>(steps.size()), static_cast<int32_t>(used), 8};
    std::copy(std::begin(header), std::end(header), meta.begin());

    Values q(shape_.element, rows * shape_.q_row());
    Values k(shape_.element, rows * shape_.kv_row());
    Values v(shape_.element, rows * shape_.kv_row());
    Values out(shape_.element, rows * shape_.q_row());
    for (int64_t i = 0; i < rows * shape_.q_row(); ++i) out.set(i, before);
    int64_t row = 0;
    for (const Step& step : steps) {
      const Sequence& from = sequences_[step.index];
      const int64_t token = done_[step.index];
      q.copy(row * shape_.q_row(), from.q, token * shape_.q_row(), step.count * shape_.q_row());
      k.copy(row * shape_.kv_row(), from.k, token * shape_.kv_row(), step.count * shape_.kv_row());
      v.copy(row * shape_.kv_row(), from.v, token * shape_.kv_row(), step.count * shape_.kv_row());
      row += step.count;
    }
    run(q, k, v, meta, rows, sequences > 0 ? sequences : static_cast<int64_t>(steps.size()), &out);

    row = 0;
    for (const Step& step : steps) {
      results_[step.index].copy(done_[step.index] * shape_.q_row(), out, row * shape_.q_row(),
                                step.count * shape_.q_row());
      done_[step.index] += step.count;
      row += step.count;
    }
    for (int64_t i = used * shape_.q_row(); i < rows * shape_.q_row(); ++i) {
      if (!CHECK_EQ(out.get(i), 0.0f)) break;
    }
  }

  const Values& result(int64_t index) const { return results_[index]; }
  // Slots are given out backwards, so that a slot is no row and no sequence number.
  int64_t slot(int64_t index) const { return static_cast<int64_t>(sequences_.size()) - 1 - index; }
  // Of layer kLayer.
  char* at(int64_t index, int64_t kv, int64_t head, int64_t token) const {
    return base_ + slot(index) * layout_.slot_bytes + layout_.offset_bytes(kLayer, kv, head, token);
  }
  int64_t row_bytes() const { return int64_t{shape_.head_dim} * element_bytes(shape_.element); }

  static constexpr int32_t kLayer = 1;

 private:
  void map(int64_t index, int64_t tokens) {
    char* begin = base_ + slot(index) * layout_.slot_bytes;
    for (int64_t chunk = layout_.chunks_for(done_[index]); chunk < layout_.chunks_for(tokens);
         ++chunk) {
      char* memory = begin + chunk * layout_.chunk_bytes;
      REQUIRE(mprotect(memory, layout_.chunk_bytes, PROT_READ | PROT_WRITE) == 0);
      std::memset(memory, 0xff, layout_.chunk_bytes);
    }
  }

  void run(const Values& q, const Values& k, const Values& v, const std::vector<int32_t>& meta,
           int64_t rows, int64_t sequences, Values* out) {
    const AttentionShape shape = {
        shape_.element,    rows, sequences, shape_.q_heads(), shape_.kv_heads, shape_.head_dim,
        layout_.max_tokens};
    constexpr size_t kAlignment = 128;
    const int64_t bytes = Workspace(shape, nullptr).bytes;
    char* workspace = nullptr;
    if (bytes > 0)
      workspace = static_cast<char*>(::operator new(bytes, std::align_val_t(kAlignment)));
    if (bytes > 0) std::memset(workspace, 0xff, bytes);
    const int32_t layer = kLayer;
    const int32_t window = shape_.window;
    const int32_t epoch = epoch_;

    AttentionArgs args;
    args.q = q.at(0);
    args.k = k.at(0);
    args.v = v.at(0);
    args.out = out->at(0);
    args.step.words = meta.data();
    args.layer = &layer;
    args.window = &window;
    args.epoch = &epoch;
    args.epoch_out = &epoch_;
    args.kv = KvView(layout_, base_);
    args.rows = static_cast<int32_t>(rows);
    args.q_heads = shape_.q_heads();
    args.head_dim = shape_.head_dim;
    args.group = Divisor(shape_.group);
    args.scale = shape_.scale();
    args.soft_cap = shape_.soft_cap;
    args.workspace = Workspace(shape, workspace);
    CHECK(launch(shape, args).ok());
    CHECK_EQ(epoch_, epoch + 1);
    ::operator delete(workspace, std::align_val_t(kAlignment));
  }

  Status launch(const AttentionShape& shape, const AttentionArgs& args) {
    const bool fast = on_tensor_cores(shape);
    switch (shape.element) {
      case Element::kBFloat16:
        return fast ? launch_tensor_cores<BFloat16>(launcher_, args)
                    : launch_exact<BFloat16>(launcher_, args);
      case Element::kFloat16:
        return fast ? launch_tensor_cores<Float16>(launcher_, args)
                    : launch_exact<Float16>(launcher_, args);
      case Element::kFloat32:
        break;
    }
    return launch_exact<Float32>(launcher_, args);
  }

  const Shape shape_;
  const std::vector<Sequence>& sequences_;
  std::vector<int64_t> done_;
  std::vector<Values> results_;
  KvLayout layout_;
  char* base_ = nullptr;
  int32_t epoch_ = 41;
  EmulatedLauncher launcher_;
};

}  // namespace ellm::cuda
