// Attention over KV slots against float64, and the equality of a row's bits however the work is
// cut.
#include "attention_fixtures.h"

namespace ellm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Types of q, and whether K and V are held in int8.
constexpr std::pair<ElementType, bool> kHeld[] = {{ElementType::kFloat32, false},
                                                  {ElementType::kBFloat16, false},
                                                  {ElementType::kFloat32, true},
                                                  {ElementType::kBFloat16, true}};

// Under TSan those that the machine would use: what threads share is the same for all.
std::vector<const Kernels*> kernels_to_cut() {
  std::vector<const Kernels*> found = machine_kernels();
  if (check::under_tsan) found.erase(found.begin(), found.end() - 1);
  return found;
}

std::vector<Sequence> make_sequences(const Shape& shape, const std::vector<int64_t>& tokens,
                                     std::mt19937_64* random) {
  std::vector<Sequence> sequences;
  for (int64_t count : tokens) sequences.emplace_back(shape, count, random);
  return sequences;
}

// Tokens [begin, end) of a sequence, over K and V as they are held; float32 within 3e-5, bfloat16
// within the rounding of the result and, where products are taken of bfloat16 pairs, of the weights
// and so of their sum.
bool check_against_float64(const Kernels& kernels, const Shape& shape, const Sequence& sequence,
                           const Elements& result, int64_t begin, int64_t end) {
  const Sequence held = as_held(shape, sequence);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t h = 0; h < shape.q_heads(); ++h) {
      const Exact exact = attend_float64(shape, held, t, h);
      for (int64_t d = 0; d < shape.head_dim; ++d) {
        const float got = result.get(t * shape.q_row() + h * shape.head_dim + d);
        const double want = exact.row[d];
        double bound = 3e-5;
        if (shape.type == ElementType::kBFloat16) {
          bound += std::fabs(want) / 256;
          if (kernels.bf16_pairs) bound += (exact.size[d] + std::fabs(want)) / 256;
        }
        if (std::fabs(got - want) <= bound) continue;  // false for NaN
        std::cerr << kernels.isa << " " << shape << ": token " << t << " head " << h << " dim " << d
                  << ": " << got << ", float64 " << want << "\n";
        return CHECK(std::fabs(got - want) <= bound);
      }
    }
  }
  return true;
}

bool same_tokens(const Shape& shape, const Elements& a, const Elements& b, int64_t begin,
                 int64_t end) {
  return a.same(begin * shape.q_row(), b, begin * shape.q_row(), (end - begin) * shape.q_row());
}

void check_shapes_against_float64(bool scaled) {
  if (check::under_tsan) return;  // No threads.
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    int turn = 0;
    for (int64_t head_dim : {32, 40, 64, 80, 96, 128, 256}) {
      for (int64_t tile : {16, 24, 40, 64}) {
        for (ElementType type : kTypes) {
          Shape shape;
          shape.type = type;
          shape.scaled = scaled;
          shape.head_dim = head_dim;
          shape.tile = scaled ? tile - turn % 2 : tile;
          shape.group = 1 << turn % 4;
          shape.window = turn % 3 == 1 ? 21 : 0;
          shape.soft_cap = turn % 5 == 2 ? 3.0f : 0.0f;
          shape.parts = turn % 2 == 0 ? tile : 0;
          ++turn;
          const auto sequences = make_sequences(shape, {38, 19, 71, 1, 66}, &random);
          Runner runner(*kernels, shape, sequences);
          runner.history(0, 37);
          runner.history(2, 50);
          runner.history(4, 64);
          runner.batch({{0, 1}, {1, 19}, {2, 21}, {3, 1}, {4, 2}});
          const int64_t begin[] = {37, 0, 50, 0, 64};
          for (int64_t i = 0; i < 5; ++i) {
            if (!check_against_float64(*kernels, shape, sequences[i], runner.result(i), begin[i],
                                       sequences[i].tokens)) {
              return;
            }
          }
        }
      }
    }
  }
}

TEST(attention_matches_float64) { check_shapes_against_float64(false); }

TEST(attention_over_int8_matches_float64) { check_shapes_against_float64(true); }

TEST(long_contexts_match_float64) {
  if (check::under_tsan) return;  // No threads.
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (const auto& [type, scaled] : kHeld) {
      for (int64_t window : {0, 300, 1500}) {
        Shape shape;
        shape.type = type;
        shape.scaled = scaled;
        shape.tile = 24;
        shape.window = window;
        const auto sequences = make_sequences(shape, {1024, 1025, 1034, 2110}, &random);
        const int64_t history[] = {1023, 1024, 1025, 2105};
        Runner runner(*kernels, shape, sequences);
        for (int64_t i = 0; i < 4; ++i) runner.history(i, history[i]);
        runner.batch({{0, 1}, {1, 1}, {2, 9}, {3, 5}}, 64);
        for (int64_t i = 0; i < 4; ++i) {
          if (!check_against_float64(*kernels, shape, sequences[i], runner.result(i), history[i],
                                     sequences[i].tokens)) {
            return;
          }
        }
      }
    }
  }
}

// Every way to cut the same tokens has to give the same bits. Under TSan the ways with threads, and
// one of the others to compare with.
void check_cuts(const Kernels& kernels, const Shape& shape, int64_t history, int64_t fresh,
                std::mt19937_64* random) {
  const int64_t end = history + fresh;
  const auto sequences = make_sequences(shape, {end, 2 * fresh, history + 3}, random);
  Runner alone(kernels, shape, sequences);
  alone.history(0, history);
  const int64_t step = check::under_tsan ? fresh : 1;
  for (int64_t t = 0; t < fresh; t += step) alone.batch({{0, step}});

  const auto check = [&](const char* cut, int64_t num_threads, const ParallelFor& parallel,
                         const auto& run) {
    Runner runner(kernels, shape, sequences);
    runner.history(0, history);
    run([&](const std::vector<Step>& steps) { runner.batch(steps, num_threads, parallel); });
    if (same_tokens(shape, runner.result(0), alone.result(0), history, end)) return;
    std::cerr << kernels.isa << " " << shape << ": " << cut << "\n";
    CHECK(!"a row's bits depend on how the work is cut");
  };
  const auto in_chunks = [&](int64_t size) {
    return [&, size](const auto& batch) {
      for (int64_t t = 0; t < fresh; t += size) batch({{0, std::min(size, fresh - t)}});
    };
  };
  const auto mixed = [&](const auto& batch) {
    batch({{1, 3}, {0, 2}, {2, history}});
    for (int64_t t = 2; t < fresh; t += 5) batch({{2, 1}, {0, std::min<int64_t>(5, fresh - t)}});
  };
  const auto short_mix = [&](const auto& batch) {
    batch({{1, fresh}, {0, fresh / 2}});
    batch({{0, fresh - fresh / 2}, {1, fresh}});
  };
  const ParallelFor serial = run_serially;
  const ParallelFor threads = threaded(4);
  if (!check::under_tsan) {
    check("one chunk", 1, serial, in_chunks(fresh));
    check("chunks of 7", 1, serial, in_chunks(7));
    check("decodes, parts divided", 64, serial, in_chunks(1));
    check("one chunk, parts divided", 1000, serial, in_chunks(fresh));
  }
  check("chunks of 3 on threads", 4, threads, in_chunks(3));
  check("one chunk on threads, parts divided", 1000, threads, in_chunks(fresh));
  check("in a mixed batch", 2, threads, short_mix);
  if (fresh <= 16) check("decodes of others beside", 1000, threads, mixed);
}

TEST(rows_do_not_depend_on_how_work_is_cut) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : kernels_to_cut()) {
    int turn = 0;
    for (int64_t head_dim : {32, 40, 64, 128}) {
      for (int64_t tile : {16, 24, 40, 64, 15, 31, 57, 90}) {
        Shape shape;
        shape.type = kTypes[turn / 2 % 2];
        shape.scaled = tile % 8 != 0;
        shape.head_dim = head_dim;
        shape.tile = tile;
        shape.group = 1 << turn % 4;
        shape.kv_heads = 1 + turn % 2;
        shape.window = turn % 3 == 1 ? 45 : 0;
        shape.soft_cap = turn % 5 == 2 ? 3.0f : 0.0f;
        shape.parts = (1 + turn % 3) * tile;
        ++turn;
        check_cuts(*kernels, shape, 61, 50, &random);
      }
    }
  }
}

TEST(rows_of_long_contexts_do_not_depend_on_how_work_is_cut) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : kernels_to_cut()) {
    for (const auto& [type, scaled] : kHeld) {
      for (int64_t window : {0, 1100}) {
        Shape shape;
        shape.type = type;
        shape.scaled = scaled;
        shape.kv_heads = 3;
        shape.tile = 40;
        shape.window = window;
        check_cuts(*kernels, shape, 2071, 16, &random);
      }
    }
  }
}

// Long enough that units take as many rows as they ever do.
TEST(rows_of_long_prompts_do_not_depend_on_how_work_is_cut) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : kernels_to_cut()) {
    for (const auto& [type, scaled] : kHeld) {
      for (int64_t window : {0, 100}) {
        Shape shape;
        shape.type = type;
        shape.scaled = scaled;
        shape.kv_heads = 1;
        shape.group = 4;
        shape.head_dim = 32;
        shape.tile = 40;
        shape.window = window;
        check_cuts(*kernels, shape, 5, 420, &random);
      }
    }
  }
}

TEST(nan_and_infinity_reach_only_the_rows_that_see_them) {
  if (check::under_tsan) return;  // No threads.
  std::mt19937_64 random(check::seed);
  constexpr int64_t kTokens = 60, kAt = 33;
  for (const Kernels* kernels : machine_kernels()) {
    for (const auto& [type, scaled] : kHeld) {
      for (int64_t window : {0, 10}) {
        for (float bad : {kNan, kInfinity}) {
          for (const char which : {'q', 'k', 'v'}) {
            Shape shape;
            shape.type = type;
            shape.scaled = scaled;
            shape.tile = 24;
            shape.window = window;
            shape.parts = kAt % 2 ? 24 : 48;
            const auto clean = make_sequences(shape, {kTokens, 20}, &random);
            auto dirty = clean;
            Elements& touched = which == 'q' ? dirty[0].q : which == 'k' ? dirty[0].k : dirty[0].v;
            const int64_t row = which == 'q' ? shape.q_row() : shape.kv_row();
            for (int64_t i = 0; i < row; ++i) touched.set(kAt * row + i, bad);
            Runner expected(*kernels, shape, clean), runner(*kernels, shape, dirty);
            for (Runner* r : {&expected, &runner}) r->batch({{1, 20}, {0, kTokens}});
            const int64_t last = which == 'q' ? kAt : window > 0 ? kAt + window - 1 : kTokens - 1;
            CHECK(same_tokens(shape, runner.result(1), expected.result(1), 0, 20));
            CHECK(same_tokens(shape, runner.result(0), expected.result(0), 0, kAt));
            CHECK(same_tokens(shape, runner.result(0), expected.result(0), last + 1, kTokens));
            // -inf scores may weigh nothing; in int8 the whole row is NaN.
            if (which == 'k' && bad == kInfinity && !scaled) continue;
            for (int64_t i = kAt * shape.q_row(); i < (last + 1) * shape.q_row(); ++i) {
              if (!CHECK(!std::isfinite(runner.result(0).get(i)))) break;
            }
          }
        }
      }
    }
  }
}

// A part whose every score is NaN must not pass for a part that the row does not see.
TEST(nan_alone_in_the_last_part_is_not_lost) {
  if (check::under_tsan) return;  // No threads.
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (const auto& [type, scaled] : kHeld) {
      Shape shape;
      shape.type = type;
      shape.scaled = scaled;
      shape.parts = shape.tile = 24;
      const int64_t row = shape.kv_row();
      auto sequences = make_sequences(shape, {49}, &random);
      for (int64_t i = 0; i < row; ++i) sequences[0].k.set(48 * row + i, kNan);
      for (int64_t num_threads : {1, 1000}) {
        Runner runner(*kernels, shape, sequences);
        runner.batch({{0, 49}}, num_threads);
        for (int64_t i = 0; i < shape.q_row(); ++i) {
          if (!CHECK(std::isfinite(runner.result(0).get(47 * shape.q_row() + i)))) return;
          if (!CHECK(std::isnan(runner.result(0).get(48 * shape.q_row() + i)))) return;
        }
      }
    }
  }
}

// What the memory of a runner is to hold when all tokens are written, and nothing else.
Elements expected_memory(const Shape& shape, const std::vector<Sequence>& sequences,
                         const Runner& runner) {
  Elements expected(shape.type, runner.memory().size());
  const KvLayout& layout = runner.layout();
  const auto put = [&](int64_t slot, int64_t at, const void* from, int64_t bytes) {
    std::memcpy(expected.at(0) + slot * layout.slot_bytes + at, from, bytes);
  };
  for (int64_t i = 0; i < static_cast<int64_t>(sequences.size()); ++i) {
    for (int64_t kv = 0; kv < 2; ++kv) {
      const Elements& side = kv ? sequences[i].v : sequences[i].k;
      const Int8 rows(side, shape.head_dim);
      for (int64_t t = 0; t < sequences[i].tokens; ++t) {
        for (int64_t h = 0; h < shape.kv_heads; ++h) {
          const int64_t row = t * shape.kv_heads + h, element = row * shape.head_dim;
          const int64_t at = layout.offset_bytes(Runner::kLayer, kv, h, t);
          if (!shape.scaled) {
            put(runner.slot(i), at, side.at(element), shape.head_dim * layout.element_bytes);
            continue;
          }
          put(runner.slot(i), at, &rows.values[element], shape.head_dim);
          put(runner.slot(i), layout.scale_offset_bytes(Runner::kLayer, kv, h, t),
              &rows.scales[row], sizeof(float));
        }
      }
    }
  }
  return expected;
}

TEST(write_kv_touches_the_new_tokens_only) {
  std::mt19937_64 random(check::seed);
  for (const auto& [type, scaled] : kHeld) {
    for (int64_t tokens : {40, 700}) {  // copied at once, and handed out to threads
      Shape shape;
      shape.type = type;
      shape.scaled = scaled;
      shape.head_dim = 40;
      shape.tile = scaled ? 23 : 24;
      auto sequences = make_sequences(shape, {tokens, tokens - 9}, &random);
      for (int64_t d = 0; d < shape.head_dim; ++d) {  // a row of zeros
        sequences[0].v.set(3 * shape.kv_row() + d, 0.0f);
      }
      Runner runner(kernels(), shape, sequences);
      runner.batch({{1, 5}, {0, 2}}, 4, threaded(4), true);
      runner.batch({{0, tokens - 2}, {1, tokens - 14}}, 4, threaded(4), true);
      const Elements expected = expected_memory(shape, sequences, runner);
      CHECK(expected.same(0, runner.memory(), 0, expected.size()));
    }
  }
}

}  // namespace
}  // namespace ellm
