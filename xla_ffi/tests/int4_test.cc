// Linear layers of int4 against double precision arithmetic on what was quantised.
#include "kernels/cpu/int4.h"

#include <algorithm>
#include <memory>

#include "check.h"
#include "kernel_fixtures.h"

namespace ellm {
namespace {

std::vector<const Int4Kernels*> machine_int4_kernels() {
  std::vector<const Int4Kernels*> found;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512_vnni"}) {
    if (const Int4Kernels* k = int4_kernels_for(isa)) found.push_back(k);
  }
  return found;
}

// A float16 by its definition.
double half_value(uint16_t h) {
  const int exponent = h >> 10 & 31;
  const double fraction = h & 0x3ff;
  const double size =
      exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  return h & 0x8000 ? -size : size;
}

struct Problem {
  int64_t rows, n, k, group;
  ElementType x_type, out_type;
  Elements x;
  std::vector<uint8_t> steps;  // [n, k]
  std::vector<uint8_t> values;
  std::vector<uint16_t> scales;
  std::vector<uint8_t> zeros;  // or empty

  Problem(int64_t rows, int64_t n, int64_t k, int64_t group, bool has_zeros, ElementType x_type,
          ElementType out_type, std::mt19937_64* random)
      : rows(rows),
        n(n),
        k(k),
        group(group),
        x_type(x_type),
        out_type(out_type),
        x(random_elements(x_type, rows * k, random)),
        steps(n * k) {
    for (uint8_t& step : steps) step = static_cast<uint8_t>((*random)() % 16);
    const Int4Weights w = weights();
    const int64_t count = w.panels() * w.groups() * kInt4Columns;
    values.resize(count / 2 * group);
    for (int64_t p = 0; p < w.panels(); ++p) {
      const int64_t first = p * kInt4Columns;
      int4_pack(steps.data() + first * k, std::min(kInt4Columns, n - first), k, group, kInt4Zero,
                values.data() + p * w.groups() * 8 * group);
    }
    // Of either sign and of all sizes, the smallest ones included.
    for (int64_t i = 0; i < count; ++i) {
      scales.push_back(static_cast<uint16_t>(((*random)() % 2 << 15) + (*random)() % 0x3000));
      if (has_zeros) zeros.push_back(static_cast<uint8_t>((*random)() % 16));
    }
  }

  Int4Weights weights() const {
    return {values.data(), scales.data(), zeros.empty() ? nullptr : zeros.data(), group, n, k};
  }

  std::string name(const Int4Kernels& kernels) const {
    std::string text = kernels.isa;
    for (int64_t size : {rows, n, k, group}) text += " " + std::to_string(size);
    return text + (zeros.empty() ? " " : " zeros ") + type_name(x_type) + " " + type_name(out_type);
  }

  // Rows [begin, end) as a batch of their own.
  Elements run(const Int4Kernels& kernels, int64_t begin, int64_t end,
               const ParallelFor& parallel = run_serially) const {
    Elements part(x_type, (end - begin) * k);  // apart, so that reading past its end is an error
    part.copy(0, x, begin * k, (end - begin) * k);
    Elements out(out_type, (end - begin) * n);
    int4_linear(kernels, part.at(0), x_type, weights(), out.at(0), out_type, end - begin, parallel);
    return out;
  }
  Elements run(const Int4Kernels& kernels) const { return run(kernels, 0, rows); }
};

// As close to the product of the numbers as float32 sums and halves of a step of x allow.
void check_close(const Int4Kernels& kernels, const Problem& p) {
  const Elements out = p.run(kernels);
  const int64_t groups = p.weights().groups();
  bool good = true;
  for (int64_t m = 0; m < p.rows; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double quantised = 0, size = 0, exact = 0, bound = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t begin = g * p.group, end = std::min(p.k, begin + p.group);
        float largest = 0;
        for (int64_t i = begin; i < end; ++i) {
          largest = std::max(largest, std::fabs(p.x.get(m * p.k + i)));
        }
        const float x_scale = largest / 127.0f;
        const int64_t at = (n / kInt4Columns * groups + g) * kInt4Columns + n % kInt4Columns;
        const double scale = half_value(p.scales[at]);
        const int zero = p.zeros.empty() ? kInt4Zero : p.zeros[at];
        for (int64_t i = begin; i < end; ++i) {
          const double w = scale * (p.steps[n * p.k + i] - zero);
          const float x = p.x.get(m * p.k + i);
          const double term = double{std::nearbyint(x / x_scale)} * x_scale * w;
          quantised += term;
          size += std::fabs(term);
          exact += x * w;
          bound += x_scale / 2 * std::fabs(w);
        }
      }
      const double value = out.get(m * p.n + n);
      double error = 1e-6 * size * static_cast<double>(groups) + 1e-30;
      if (p.out_type == ElementType::kBFloat16) error += std::fabs(quantised) / 256;
      good &= std::fabs(value - quantised) <= error;
      good &= std::fabs(value - exact) <= error + 1.0001 * bound;
    }
  }
  if (!CHECK(good)) std::cerr << p.name(kernels) << "\n";
}

TEST(int4_linear_equals_double_precision) {
  std::mt19937_64 random(check::seed);
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    int64_t rows = 0;
    for (int64_t n : {1, 15, 16, 17, 33, 67}) {
      for (int64_t k : {1, 7, 31, 32, 100, 128, 160, 257}) {
        for (int64_t group : {32, 128}) {
          for (bool zeros : {false, true}) {
            rows = rows % 14 + 1;
            const ElementType x = kTypes[rows % 2], out = kTypes[(rows / 2 + n) % 2];
            check_close(*kernels, Problem(rows, n, k, group, zeros, x, out, &random));
          }
        }
      }
    }
  }
}

TEST(int4_sums_neither_saturate_nor_overflow) {
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    std::mt19937_64 random(check::seed);
    for (int64_t group : {32, 128}) {
      for (uint8_t step : {0, 15}) {
        for (float sign : {1.0f, -1.0f}) {
          Problem p(7, 20, 512, group, true, ElementType::kFloat32, ElementType::kFloat32, &random);
          for (int64_t i = 0; i < 7 * 512; ++i) p.x.set(i, 127.0f * sign);
          std::fill(p.values.begin(), p.values.end(), step * 0x11);
          std::fill(p.scales.begin(), p.scales.end(), 0x3c00);
          std::fill(p.zeros.begin(), p.zeros.end(), 15 - step);
          const Elements out = p.run(*kernels);
          const float want = sign * 127.0f * 512.0f * (step == 0 ? -15.0f : 15.0f);
          for (int64_t i = 0; i < 140; ++i) CHECK_EQ(out.get(i), want);
        }
      }
    }
  }
}

TEST(int4_linear_rows_do_not_depend_on_the_batch) {
  std::mt19937_64 random(check::seed);
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    for (int64_t k : {24, 209, 1100}) {
      for (int64_t group : {32, 128}) {
        const Problem p(20, 75, k, group, group == 32, ElementType::kBFloat16,
                        ElementType::kFloat32, &random);
        const Elements all = p.run(*kernels);
        for (int64_t size = 1; size < p.rows; ++size) {
          for (int64_t begin : {int64_t{0}, p.rows - size}) {
            const Elements part = p.run(*kernels, begin, begin + size);
            if (!CHECK(part.same(0, all, begin * p.n, size * p.n))) return;
          }
        }
      }
    }
  }
}

TEST(int4_linear_on_threads_equals_serial) {
  std::mt19937_64 random(check::seed);
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    for (int64_t rows : {1, 5, 70}) {
      const Problem p(rows, 515, 320, 32, false, ElementType::kFloat32, ElementType::kFloat32,
                      &random);
      const Elements serial = p.run(*kernels);
      for (int repeat = 0; repeat < 3; ++repeat) {
        const Elements out = p.run(*kernels, 0, rows, threaded(4));
        if (!CHECK(out.same(0, serial, 0, serial.size()))) return;
      }
    }
  }
}

TEST(int4_linear_keeps_what_is_not_finite_in_its_row) {
  std::mt19937_64 random(check::seed);
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    for (ElementType type : kTypes) {
      const Problem clean(11, 37, 50, 32, true, type, type, &random);
      const Elements want = clean.run(*kernels);
      for (float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        Problem dirty = clean;
        dirty.x.set(4 * clean.k + 49, bad);
        const Elements out = dirty.run(*kernels);
        CHECK(out.same(0, want, 0, 4 * clean.n));
        CHECK(out.same(5 * clean.n, want, 5 * clean.n, 6 * clean.n));
        for (int64_t n = 0; n < clean.n; ++n) CHECK(!std::isfinite(out.get(4 * clean.n + n)));
      }
    }
  }
}

TEST(int4_linear_of_nothing_writes_nothing) {
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    float out = 7.0f;
    const Int4Weights w = {nullptr, nullptr, nullptr, 32, 1, 4};
    int4_linear(*kernels, nullptr, ElementType::kFloat32, w, &out, ElementType::kFloat32, 0,
                run_serially);
    CHECK_EQ(out, 7.0f);
  }
}

struct Panel {
  std::vector<uint8_t> values;
  std::vector<uint16_t> scales;

  Panel(const Int4Kernels& kernels, const Elements& x, ElementType type, int64_t rows, int64_t k,
        int64_t group)
      : values((k + group - 1) / group * 8 * group, 99),
        scales((k + group - 1) / group * kInt4Columns, 99) {
    kernels.quantize(x.at(0), type, rows, k, group, values.data(), scales.data());
  }

  int step(int64_t c, int64_t i) const {
    const uint8_t byte = values[i / 8 * 64 + 4 * c + i % 4];
    return i % 8 < 4 ? byte & 15 : byte >> 4;
  }
};

// Every weight is at the step nearest to it, and no scale on a fine grid has a much lower error.
TEST(int4_groups_are_quantised_nearly_as_well_as_can_be) {
  std::mt19937_64 random(check::seed);
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    for (ElementType type : kTypes) {
      for (int64_t group : {32, 128}) {
        for (float size : {1e-3f, 1.0f, 300.0f}) {
          const int64_t rows = 13, k = 2 * group + 5;
          const Elements x = random_elements(type, rows * k, &random, size);
          const Panel panel(*kernels, x, type, rows, k, group);
          double total = 0, least = 0;
          for (int64_t c = 0; c < kInt4Columns; ++c) {
            for (int64_t g = 0; g < 3; ++g) {
              const double scale = half_value(panel.scales[g * kInt4Columns + c]);
              if (c >= rows) {
                CHECK_EQ(scale, 0.0);
                continue;
              }
              const int64_t begin = g * group, end = std::min(k, begin + group);
              double error = 0, largest = 0;
              for (int64_t i = begin; i < end; ++i) {
                const double w = x.get(c * k + i);
                const double off = std::fabs(w - scale * (panel.step(c, i) - kInt4Zero));
                const double nearest = std::min(7.0, std::max(-8.0, std::nearbyint(w / scale)));
                CHECK(off <= std::fabs(w - scale * nearest) + 1e-5 * std::fabs(scale));
                error += off * off;
                largest = std::max(largest, std::fabs(w));
              }
              double best = error;
              for (int trial = -100; trial <= 100; ++trial) {
                if (trial == 0) continue;
                const double other = largest / (trial / 10.0);
                if (std::fabs(trial) < 50) continue;
                double sum = 0;
                for (int64_t i = begin; i < end; ++i) {
                  const double w = x.get(c * k + i);
                  const double q = std::min(7.0, std::max(-8.0, std::nearbyint(w / other)));
                  sum += (w - q * other) * (w - q * other);
                }
                best = std::min(best, sum);
              }
              total += error;
              least += best;
            }
          }
          CHECK(total <= 1.1 * least);
        }
      }
    }
  }
}

TEST(int4_groups_that_are_tiny_or_not_finite) {
  for (const Int4Kernels* kernels : machine_int4_kernels()) {
    for (float bad : {std::numeric_limits<float>::quiet_NaN(),
                      -std::numeric_limits<float>::infinity(), 5e-7f}) {
      Elements x(ElementType::kFloat32, 2 * 64);
      for (int64_t i = 0; i < 128; ++i) x.set(i, i < 64 || i >= 96 ? 1.0f : 0.0f);
      x.set(64 + 3, bad);
      const Panel panel(*kernels, x, ElementType::kFloat32, 2, 64, 32);
      CHECK_EQ(panel.scales[1], std::isfinite(bad) ? 0 : 0x7e00);
      CHECK_EQ(half_value(panel.scales[0]) * (panel.step(0, 0) - 8), 1.0);
      CHECK_EQ(half_value(panel.scales[kInt4Columns + 1]) * (panel.step(1, 40) - 8), 1.0);
      // A scale that is none makes the output none, and no other.
      Problem p(1, 2, 64, 32, false, ElementType::kFloat32, ElementType::kFloat32,
                std::make_unique<std::mt19937_64>(check::seed).get());
      p.values = panel.values;
      p.scales = panel.scales;
      const Elements out = p.run(*kernels);
      CHECK(std::isfinite(out.get(0)));
      CHECK_EQ(std::isfinite(out.get(1)), std::isfinite(bad));
    }
  }
}

}  // namespace
}  // namespace ellm
