// The CUDA attention kernels on the emulated GPU, against float64.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda_fixtures.h"

namespace ellm::cuda {
namespace {

// Relative to the norm of the row, of all rows [begin, end) of a sequence: the worst.
double worst_error(const Shape& shape, const Sequence& sequence, const Values& result,
                   int64_t begin, int64_t end) {
  double worst = 0;
  for (int64_t position = begin; position < end; ++position) {
    for (int64_t head = 0; head < shape.q_heads(); ++head) {
      const std::vector<double> exact = attend_float64(shape, sequence, position, head);
      double error = 0;
      double norm = 0;
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        const double got = result.get(position * shape.q_row() + head * shape.head_dim + d);
        error += (got - exact[d]) * (got - exact[d]);
        norm += exact[d] * exact[d];
      }
      // A NaN is worse than any bound.
      const double relative = std::sqrt(error / norm);
      worst = relative <= worst ? worst : relative;
    }
  }
  return worst;
}

// Rounding of weights and results; a row's own norm is what they are relative to.
double tolerance(Element element) {
  switch (element) {
    case Element::kFloat32:
      return 5e-6;
    case Element::kFloat16:
      return 2e-3;
    case Element::kBFloat16:
      break;
  }
  return 1.5e-2;
}

void check_rows(const Shape& shape, const Sequence& sequence, const Values& result, int64_t begin,
                int64_t end) {
  const double error = worst_error(shape, sequence, result, begin, end);
  if (!CHECK(error < tolerance(shape.element))) {
    std::cerr << "  " << shape << ": error " << error << "\n";
  }
}

// So many new tokens of each sequence after so many that are there.
void one_batch(const Shape& shape, const std::vector<int64_t>& contexts,
               const std::vector<int64_t>& counts, EmulatedLauncher launcher) {
  std::mt19937_64 random(check::seed);
  std::vector<Sequence> sequences;
  for (size_t i = 0; i < contexts.size(); ++i) {
    sequences.emplace_back(shape, contexts[i] + counts[i] + 1, &random);
  }
  EmulatedGpu gpu(shape, sequences, launcher);
  std::vector<Step> steps;
  for (size_t i = 0; i < contexts.size(); ++i) {
    const auto index = static_cast<int64_t>(i);
    gpu.history(index, contexts[i]);
    steps.push_back({index, counts[i]});
  }
  gpu.batch(steps);
  for (size_t i = 0; i < contexts.size(); ++i) {
    check_rows(shape, sequences[i], gpu.result(i), contexts[i], contexts[i] + counts[i]);
    // What the kernels wrote is where the layout says.
    for (int64_t t = contexts[i]; t < contexts[i] + counts[i]; ++t) {
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        const int64_t from = t * shape.kv_row() + head * shape.head_dim;
        const auto index = static_cast<int64_t>(i);
        CHECK(std::memcmp(gpu.at(index, 0, head, t), sequences[i].k.at(from), gpu.row_bytes()) ==
              0);
        CHECK(std::memcmp(gpu.at(index, 1, head, t), sequences[i].v.at(from), gpu.row_bytes()) ==
              0);
      }
    }
  }
}

// Decodes and prompts in one batch, some of them from their start and some after a context.
void mixed_batch(const Shape& shape, EmulatedLauncher launcher = {}) {
  one_batch(shape, {0, 37, 300, 95, 0}, {1, 1, 1, 23, 5}, launcher);
}

TEST(heads_of_every_size_and_type) {
  mixed_batch({Element::kFloat16, 1, 7, 80, 24});
  mixed_batch({Element::kFloat16, 2, 1, 96, 40});
  mixed_batch({Element::kBFloat16, 1, 8, 128, 16});
  mixed_batch({Element::kBFloat16, 1, 2, 256, 64});
  mixed_batch({Element::kBFloat16, 1, 20, 64, 16});
}

TEST(nothing_depends_on_timing) {
  for (const bool late_copies : {false, true}) {
    for (const bool backwards : {false, true}) {
      for (const bool hopper : {false, true}) {
        mixed_batch({Element::kBFloat16, 1, 4, 64, 16}, {{late_copies, backwards}, hopper});
      }
    }
  }
}

TEST(products_of_warpgroups) {
  EmulatedLauncher hopper;
  hopper.hopper = true;
  mixed_batch({Element::kBFloat16, 2, 4, 128, 16}, hopper);
  mixed_batch({Element::kFloat16, 1, 7, 80, 24}, hopper);
  mixed_batch({Element::kBFloat16, 1, 3, 64, 16, 50}, hopper);
  mixed_batch({Element::kBFloat16, 1, 2, 96, 40, 130, 4.0f}, hopper);
}

// Tiles that are loaded while others are taken in, sums that are rescaled, tiles that all rows see
// whole; with the window, tiles that are left out.
TEST(products_of_warpgroups_over_several_tiles) {
  for (const int32_t window : {0, 140}) {
    for (const bool late_copies : {false, true}) {
      for (const bool backwards : {false, true}) {
        one_batch({Element::kBFloat16, 1, 1, 64, 16, window}, {300, 0}, {40, 290},
                  {{late_copies, backwards}, true, 2});
      }
    }
  }
  one_batch({Element::kFloat16, 1, 2, 128, 24, 0, 3.0f}, {500}, {70}, {{}, true});
}

TEST(windows_and_soft_caps) {
  mixed_batch({Element::kBFloat16, 1, 3, 64, 16, 50});
  mixed_batch({Element::kFloat16, 1, 2, 64, 16, 1});
  mixed_batch({Element::kBFloat16, 1, 2, 64, 16, 130, 4.0f});
}

TEST(exact_arithmetic_of_any_head) {
  mixed_batch({Element::kFloat32, 2, 2, 64, 16});
  mixed_batch({Element::kFloat32, 1, 3, 34, 8, 21, 3.0f});
  mixed_batch({Element::kBFloat16, 2, 1, 20, 16});
  mixed_batch({Element::kFloat16, 1, 2, 18, 16});
}

// Several parts, merged; a window that begins inside one; more heads than one block takes.
TEST(long_contexts) {
  for (const Shape& shape :
       {Shape{Element::kBFloat16, 1, 2, 64, 32}, Shape{Element::kBFloat16, 1, 2, 64, 32, 600},
        Shape{Element::kFloat16, 2, 20, 80, 16}, Shape{Element::kBFloat16, 1, 1, 256, 16}}) {
    std::mt19937_64 random(check::seed);
    std::vector<Sequence> sequences;
    for (const int64_t tokens : {1201, 513, 257, 256})
      sequences.emplace_back(shape, tokens, &random);
    EmulatedGpu gpu(shape, sequences);
    std::vector<Step> steps;
    for (size_t i = 0; i < sequences.size(); ++i) {
      gpu.history(i, sequences[i].tokens - 1);
      steps.push_back({static_cast<int64_t>(i), 1});
    }
    gpu.batch(steps, 7);
    for (size_t i = 0; i < sequences.size(); ++i) {
      check_rows(shape, sequences[i], gpu.result(i), sequences[i].tokens - 1, sequences[i].tokens);
    }
  }
}

// Decoding alone, among others, and with other numbers of blocks: whichever is done last merges.
// Prompts in other pieces.
TEST(a_row_has_the_same_bits_in_any_batch) {
  const Shape shape = {Element::kBFloat16, 1, 4, 64, 16};
  std::mt19937_64 random(check::seed);
  std::vector<Sequence> sequences;
  for (const int64_t tokens : {601, 90, 40}) sequences.emplace_back(shape, tokens, &random);
  const auto run = [&](const std::vector<std::vector<Step>>& batches, int64_t history,
                       int64_t history_1, EmulatedLauncher launcher = {}) {
    auto gpu = std::make_unique<EmulatedGpu>(shape, sequences, launcher);
    gpu->history(0, history);
    gpu->history(1, history_1);
    for (const auto& steps : batches) gpu->batch(steps);
    return gpu;
  };
  const auto alone = run({{{0, 1}}}, 600, 0);
  const auto among = run({{{2, 40}, {0, 1}, {1, 1}}}, 600, 20);
  CHECK(alone->result(0).same(600 * shape.q_row(), among->result(0), 600 * shape.q_row(),
                              shape.q_row()));
  for (const int64_t resident_blocks : {1, 2, 100}) {
    const auto other = run({{{0, 1}}}, 600, 0, {{}, false, resident_blocks});
    CHECK(alone->result(0).same(600 * shape.q_row(), other->result(0), 600 * shape.q_row(),
                                shape.q_row()));
  }

  const auto whole = run({{{1, 90}}}, 0, 0);
  for (const auto& pieces : {std::vector<int64_t>{2, 61, 27}, {77, 13}}) {
    std::vector<std::vector<Step>> batches;
    for (const int64_t piece : pieces) batches.push_back({{2, 5}, {1, piece}});
    const auto divided = run(batches, 0, 0);
    CHECK(whole->result(1).same(0, divided->result(1), 0, 90 * shape.q_row()));
  }
}

TEST(prompts_of_several_tiles_have_the_same_bits_in_any_pieces) {
  const Shape shape = {Element::kBFloat16, 1, 1, 64, 16};
  std::mt19937_64 random(check::seed);
  std::vector<Sequence> sequences;
  for (const int64_t tokens : {300, 40}) sequences.emplace_back(shape, tokens, &random);
  for (const bool hopper : {false, true}) {
    const EmulatedLauncher launcher = {{}, hopper};
    EmulatedGpu whole(shape, sequences, launcher);
    whole.batch({{0, 300}});
    EmulatedGpu divided(shape, sequences, launcher);
    for (const int64_t piece : {2, 150, 148}) divided.batch({{1, 5}, {0, piece}});
    CHECK(whole.result(0).same(0, divided.result(0), 0, 300 * shape.q_row()));
  }
}

// The host refuses it before; without kernels for prompts nobody else writes these rows.
TEST(a_prompt_in_a_step_for_decodes_is_nan) {
  const Shape shape = {Element::kBFloat16, 2, 2, 64, 16};
  std::mt19937_64 random(check::seed);
  std::vector<Sequence> sequences;
  for (const int64_t tokens : {30, 20}) sequences.emplace_back(shape, tokens, &random);
  EmulatedGpu gpu(shape, sequences);
  gpu.history(1, 19);
  constexpr int64_t kSequences = 8;  // no fewer than rows
  gpu.batch({{0, 3}, {1, 1}}, kSequences, 1.0f);
  for (int64_t i = 0; i < 3 * shape.q_row(); ++i) {
    if (!CHECK(std::isnan(gpu.result(0).get(i)))) break;
  }
  check_rows(shape, sequences[1], gpu.result(1), 19, 20);
}

TEST(float32_has_the_same_bits_as_prompt_and_one_by_one) {
  const Shape shape = {Element::kFloat32, 1, 2, 32, 16};
  std::mt19937_64 random(check::seed);
  std::vector<Sequence> sequences;
  sequences.emplace_back(shape, 70, &random);
  EmulatedGpu whole(shape, sequences);
  whole.batch({{0, 70}});
  EmulatedGpu divided(shape, sequences);
  divided.batch({{0, 1}});
  divided.batch({{0, 66}});
  for (int i = 0; i < 3; ++i) divided.batch({{0, 1}});
  CHECK(whole.result(0).same(0, divided.result(0), 0, 70 * shape.q_row()));
}

TEST(a_step_without_sequences_clears_its_rows) {
  const Shape shape;
  std::mt19937_64 random(check::seed);
  std::vector<Sequence> sequences;
  sequences.emplace_back(shape, 4, &random);
  EmulatedGpu gpu(shape, sequences);
  gpu.batch({}, 1);
}

// The emulator notices what it is there to notice.
TEST(a_missing_wait_is_seen) {
  alignas(16) const char from[16] = {7};
  char seen = 0;
  const auto read_early = [&] {
    if (thread_index() > 0) return;
    copy_async(shared_memory(), from, true);
    commit_copies();
    seen = shared_memory()[0];
    wait_copies<0>();
  };
  emulator::run(1, 32, 16, {true, false}, read_early);
  CHECK_EQ(static_cast<int>(seen), -1);
  emulator::run(1, 32, 16, {false, false}, read_early);
  CHECK_EQ(static_cast<int>(seen), 7);
}

enum class Without { kNothing, kCopyWait, kFence, kBarrier, kBegin, kCommit, kWait };

// Whether the emulator lets a warpgroup multiply [64, 64] by [128, 64], all ones.
bool multiplies(Without without) {
  constexpr int32_t kVectors = (64 + 128) * 8;
  alignas(16) static const uint16_t ones[8] = {0x3f80, 0x3f80, 0x3f80, 0x3f80,
                                               0x3f80, 0x3f80, 0x3f80, 0x3f80};
  const auto product = [&] {
    for (int32_t i = thread_index(); i < kVectors; i += 4 * kWarp) {
      copy_async(shared_memory() + i * kVectorBytes, ones, true);
    }
    commit_copies();
    if (without != Without::kCopyWait) wait_copies<0>();
    if (without != Without::kFence) publish_to_products();
    if (without != Without::kBarrier) sync_block();
    const uint64_t a = describe_tile(shared_address(shared_memory()), 0);
    const uint64_t b = describe_tile(shared_address(shared_memory() + 64 * kSwizzledRowBytes), 0);
    float d[16][4];
    if (without != Without::kBegin) begin_products();
    multiply_tiles(BFloat16(), d, a, b, false);
    multiply_tiles(BFloat16(), d, a, b, true);
    if (without != Without::kCommit) commit_products();
    if (without == Without::kWait) return;
    wait_products();
    CHECK_EQ(d[15][3], 32.0f);
  };
  try {
    emulator::run(1, 4 * kWarp, kVectors * kVectorBytes, {}, product);
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}

TEST(what_a_product_of_a_warpgroup_lacks_is_seen) {
  CHECK(multiplies(Without::kNothing));
  for (const Without without : {Without::kCopyWait, Without::kFence, Without::kBarrier,
                                Without::kBegin, Without::kCommit, Without::kWait}) {
    if (!CHECK(!multiplies(without))) std::cerr << "  " << static_cast<int>(without) << "\n";
  }
}

TEST(a_barrier_that_some_never_reach_is_seen) {
  bool caught = false;
  try {
    emulator::run(1, 64, 16, {}, [] {
      if (thread_index() < 32) sync_block();
    });
  } catch (const std::runtime_error&) {
    caught = true;
  }
  CHECK(caught);
}

}  // namespace
}  // namespace ellm::cuda
