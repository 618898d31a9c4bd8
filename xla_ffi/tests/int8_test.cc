// Linear layers of int8 against plain integer arithmetic, bit for bit on every instruction set.
#include "kernels/cpu/int8.h"

#include <algorithm>

#include "check.h"
#include "kernel_fixtures.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/panels.h"

namespace ellm {
namespace {

// Parts in which the columns are handed out; not the number of threads anywhere.
constexpr int64_t kRanges = 3;

std::vector<const Int8Kernels*> machine_int8_kernels() {
  std::vector<const Int8Kernels*> found;
  for (const char* isa : {"generic", "avx2", "avx512", "avx512_vnni"}) {
    if (const Int8Kernels* k = int8_kernels_for(isa)) found.push_back(k);
  }
  return found;
}

struct Quantized {
  int64_t rows, k;
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Quantized(int64_t rows, int64_t k)
      : rows(rows), k(k), values(rows * k, 99), scales(rows, -1.0f), sums(rows, -1) {}

  bool operator==(const Quantized& other) const {
    return values == other.values && sums == other.sums &&
           std::memcmp(scales.data(), other.scales.data(), scales.size() * sizeof(float)) == 0;
  }
};

Quantized quantized(const Int8Kernels& kernels, const Elements& x, ElementType type, int64_t rows,
                    int64_t k) {
  Quantized q(rows, k);
  kernels.quantize(x.at(0), type, rows, k, {q.values.data(), k, q.scales.data(), q.sums.data()});
  return q;
}

// The definition, an element at a time.
Quantized by_hand(const Elements& x, int64_t rows, int64_t k) {
  Quantized q(rows, k);
  for (int64_t m = 0; m < rows; ++m) {
    float largest = 0;
    for (int64_t i = 0; i < k; ++i) largest = std::max(largest, std::fabs(x.get(m * k + i)));
    q.scales[m] = largest / 127.0f;
    q.sums[m] = 0;
    for (int64_t i = 0; i < k; ++i) {
      const float value = largest == 0 ? 0 : std::nearbyint(x.get(m * k + i) / q.scales[m]);
      q.values[m * k + i] = static_cast<int8_t>(value);
      q.sums[m] += q.values[m * k + i];
    }
  }
  return q;
}

struct Problem {
  int64_t rows, n, k;
  ElementType x_type, out_type;
  Elements x, dense;
  Quantized w;

  Problem(int64_t rows, int64_t n, int64_t k, ElementType x_type, ElementType out_type,
          std::mt19937_64* random)
      : rows(rows),
        n(n),
        k(k),
        x_type(x_type),
        out_type(out_type),
        x(random_elements(x_type, rows * k, random)),
        dense(random_elements(ElementType::kFloat32, n * k, random, 0.1f)),
        w(by_hand(dense, n, k)) {}

  std::string name(const Int8Kernels& kernels) const {
    std::string text = kernels.isa;
    for (int64_t size : {rows, n, k}) text += " " + std::to_string(size);
    return text + " " + type_name(x_type) + " " + type_name(out_type);
  }

  // Rows [begin, end) as a batch of their own.
  Elements run(const Int8Kernels& kernels, int64_t begin, int64_t end,
               const ParallelFor& parallel = run_serially) const {
    Elements part(x_type, (end - begin) * k);  // apart, so that reading past its end is an error
    part.copy(0, x, begin * k, (end - begin) * k);
    Elements out(out_type, (end - begin) * n);
    int8_linear(kernels, part.at(0), x_type, w.values.data(), w.scales.data(), out.at(0), out_type,
                end - begin, n, k, parallel, kRanges);
    return out;
  }
  Elements run(const Int8Kernels& kernels) const { return run(kernels, 0, rows); }

  // All of it with the weights in panels.
  Elements run_in_panels(const Int8Kernels& kernels,
                         const ParallelFor& parallel = run_serially) const {
    std::vector<int8_t> panels = w.values;
    pack_panels(panels.data(), n, k / kWordBytes);
    Elements out(out_type, rows * n);
    int8_linear_panels(kernels, x.at(0), x_type, panels.data(), w.scales.data(), out.at(0),
                       out_type, rows, n, k, parallel, kRanges);
    return out;
  }
};

// Equal to the bit to int64 sums that are scaled, and as close to the product of the numbers that
// were quantised as halves of a step allow.
void check_exact(const Int8Kernels& kernels, const Problem& p) {
  const Elements out = p.run(kernels);
  const Quantized x = by_hand(p.x, p.rows, p.k);
  Elements want(p.out_type, p.rows * p.n);
  for (int64_t m = 0; m < p.rows; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      int64_t sum = 0;
      double exact = 0, bound = 0;
      for (int64_t i = 0; i < p.k; ++i) {
        const double a = p.x.get(m * p.k + i), b = p.dense.get(n * p.k + i);
        sum += int64_t{x.values[m * p.k + i]} * p.w.values[n * p.k + i];
        exact += a * b;
        bound += (std::fabs(a) * p.w.scales[n] + std::fabs(b) * x.scales[m]) / 2 +
                 double{x.scales[m]} * p.w.scales[n] / 4;
      }
      const float value = static_cast<float>(sum) * x.scales[m] * p.w.scales[n];
      want.set(m * p.n + n, value);
      if (p.out_type == ElementType::kBFloat16) bound += std::fabs(value) / 256;
      CHECK(std::fabs(out.get(m * p.n + n) - exact) <= 1.0001 * bound + 1e-6 * std::fabs(exact));
    }
  }
  if (!CHECK(out.same(0, want, 0, out.size()))) std::cerr << p.name(kernels) << "\n";
}

TEST(int8_rows_are_quantised_as_defined) {
  std::mt19937_64 random(check::seed);
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    for (ElementType type : kTypes) {
      for (int64_t k : {1, 3, 4, 15, 16, 17, 64, 100, 1031}) {
        for (float size : {1e-20f, 1.0f, 3e30f}) {
          Elements x = random_elements(type, 5 * k, &random, size);
          for (int64_t i = 0; i < k; ++i) x.set(2 * k + i, i % 2 == 0 ? 0.0f : -0.0f);
          // Halves of a step: 127 sets the scale to one, and ties go to the even value.
          for (int64_t i = 0; i < k; ++i) x.set(3 * k + i, static_cast<float>(i % 253 - 126) / 2);
          x.set(3 * k, -127.0f);
          CHECK(quantized(*kernels, x, type, 5, k) == by_hand(x, 5, k));
        }
      }
    }
  }
}

TEST(int8_rows_that_are_tiny_or_not_finite) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    for (float bad : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 9e-31f}) {
      Elements x(ElementType::kFloat32, 3 * 21);
      for (int64_t i = 0; i < 63; ++i) x.set(i, i / 21 == 1 ? 1e-31f : 1.0f);
      x.set(21 + 20, bad);
      const Quantized q = quantized(*kernels, x, ElementType::kFloat32, 3, 21);
      CHECK(std::isfinite(bad) ? q.scales[1] == 0.0f : std::isnan(q.scales[1]));
      CHECK_EQ(q.sums[1], 0);
      for (int64_t i = 21; i < 42; ++i) CHECK_EQ(q.values[i], 0);
      for (int64_t m : {0, 2}) CHECK_EQ(q.sums[m], 21 * 127);
    }
  }
}

TEST(int8_linear_equals_integer_arithmetic) {
  std::mt19937_64 random(check::seed);
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    int64_t rows = 0;
    for (int64_t n : {1, 3, 16, 17, 67, 130}) {
      for (int64_t k : {1, 7, 16, 33, 64, 100, 257}) {
        rows = rows % 20 + 1;
        for (ElementType x : kTypes) {
          for (ElementType out : kTypes) {
            check_exact(*kernels, Problem(rows, n, k, x, out, &random));
          }
        }
      }
    }
    for (rows = 1; rows <= 20; ++rows) {
      check_exact(*kernels,
                  Problem(rows, 53, 83, ElementType::kBFloat16, ElementType::kFloat32, &random));
    }
    // Longer than a piece of the depth.
    check_exact(*kernels,
                Problem(7, 50, 9001, ElementType::kFloat32, ElementType::kFloat32, &random));
  }
}

TEST(int8_in_panels_is_the_same_to_the_bit) {
  std::mt19937_64 random(check::seed);
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    if (kernels->linear_panels == nullptr) continue;
    int64_t rows = 0;
    for (int64_t n : {1, 16, 64, 67, 200}) {
      for (int64_t k : {4, 20, 64, 260, 4100, 8200}) {
        rows = rows % 20 + 1;
        for (ElementType x : kTypes) {
          for (ElementType out : kTypes) {
            const Problem p(rows, n, k, x, out, &random);
            const Elements want = p.run(*kernels);
            if (!CHECK(p.run_in_panels(*kernels).same(0, want, 0, want.size()))) return;
            if (!CHECK(p.run_in_panels(*kernels, threaded(4)).same(0, want, 0, want.size())))
              return;
          }
        }
      }
    }
    // More rows than wait together.
    const Problem p(400, 70, 4104, ElementType::kBFloat16, ElementType::kBFloat16, &random);
    const Elements want = p.run(*kernels);
    CHECK(p.run_in_panels(*kernels).same(0, want, 0, want.size()));
  }
}

TEST(int8_what_follows_in_a_call_is_the_same_as_after_it) {
  std::mt19937_64 random(check::seed);
  constexpr ElementType kBf16 = ElementType::kBFloat16;
  const auto bits = [](const Elements& e) { return reinterpret_cast<const uint16_t*>(e.at(0)); };
  for (const Int8Kernels* int8 : machine_int8_kernels()) {
    if (int8->linear_panels == nullptr) continue;
    for (int64_t rows : {1, 7, 40}) {
      for (int64_t n : {64, 192}) {
        const int64_t k = rows == 7 ? 4104 : 36;
        const Problem p(rows, n, k, kBf16, kBf16, &random);
        const Elements bias = random_elements(kBf16, n, &random);
        const Elements add = random_elements(kBf16, rows * n, &random);
        const auto run = [&](const Quantized& w, const Elements& biases, bool gated) {
          std::vector<int8_t> panels = w.values;
          pack_panels(panels.data(), n, k / kWordBytes);
          Elements out(kBf16, rows * n / (gated ? 2 : 1));
          int8_linear_panels(*int8, p.x.at(0), kBf16, panels.data(), w.scales.data(), out.at(0),
                             kBf16, rows, n, k, threaded(4), kRanges,
                             {bits(biases), gated ? nullptr : bits(add), gated});
          return out;
        };
        Elements biased = p.run(*int8);
        for (int64_t i = 0; i < rows * n; ++i) biased.set(i, biased.get(i) + bias.get(i % n));
        Elements added = biased;
        for (int64_t i = 0; i < rows * n; ++i) added.set(i, biased.get(i) + add.get(i));
        CHECK(run(p.w, bias, false).same(0, added, 0, added.size()));

        Elements gated(kBf16, rows * n / 2);
        kernels().silu_mul(biased.at(0), gated.at(0), kBf16, rows, n / 2);
        Quantized w = p.w;
        Elements biases = bias;
        alternate_halves(w.values.data(), n, k);
        alternate_halves(w.scales.data(), n, sizeof(float));
        alternate_halves(biases.at(0), n, element_bytes(kBf16));
        CHECK(run(w, biases, true).same(0, gated, 0, gated.size()));
      }
    }
  }
}

TEST(int8_sums_neither_saturate_nor_overflow) {
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    for (int64_t k : {int64_t{64}, kInt8MaxK}) {
      for (int64_t rows : {1, 2, 7}) {
        for (float sign : {1.0f, -1.0f}) {
          Elements x(ElementType::kFloat32, rows * k);
          for (int64_t i = 0; i < rows * k; ++i) x.set(i, 127.0f * sign);
          const std::vector<int8_t> w(5 * k, 127);
          const std::vector<float> scales(5, 1.0f);
          std::vector<float> out(rows * 5);
          int8_linear(*kernels, x.at(0), ElementType::kFloat32, w.data(), scales.data(), out.data(),
                      ElementType::kFloat32, rows, 5, k, run_serially, kRanges);
          for (float value : out) CHECK_EQ(value, sign * static_cast<float>(127 * 127 * k));
          if (kernels->linear_panels == nullptr) continue;
          std::fill(out.begin(), out.end(), 0.0f);  // Panels of the same values are those values.
          int8_linear_panels(*kernels, x.at(0), ElementType::kFloat32, w.data(), scales.data(),
                             out.data(), ElementType::kFloat32, rows, 5, k, run_serially, kRanges);
          for (float value : out) CHECK_EQ(value, sign * static_cast<float>(127 * 127 * k));
        }
      }
    }
  }
}

TEST(int8_linear_is_the_same_on_every_instruction_set) {
  std::mt19937_64 random(check::seed);
  const Int8Kernels* generic = int8_kernels_for("generic");
  for (ElementType type : kTypes) {
    const Problem p(9, 75, 2100, type, type, &random);
    const Elements want = p.run(*generic);
    for (const Int8Kernels* kernels : machine_int8_kernels()) {
      CHECK(p.run(*kernels).same(0, want, 0, want.size()));
    }
  }
}

TEST(int8_linear_rows_do_not_depend_on_the_batch) {
  std::mt19937_64 random(check::seed);
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    for (int64_t k : {24, 209, 4200}) {
      const Problem p(20, 75, k, ElementType::kBFloat16, ElementType::kFloat32, &random);
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

TEST(int8_linear_on_threads_equals_serial) {
  std::mt19937_64 random(check::seed);
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    for (int64_t rows : {1, 5, 70}) {
      const Problem p(rows, 515, 320, ElementType::kFloat32, ElementType::kFloat32, &random);
      const Elements serial = p.run(*kernels);
      for (int repeat = 0; repeat < 3; ++repeat) {
        const Elements out = p.run(*kernels, 0, rows, threaded(4));
        if (!CHECK(out.same(0, serial, 0, serial.size()))) return;
      }
    }
  }
}

TEST(int8_linear_keeps_what_is_not_finite_in_its_row) {
  std::mt19937_64 random(check::seed);
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    for (ElementType type : kTypes) {
      const Problem clean(11, 37, 50, type, type, &random);
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

TEST(int8_linear_of_nothing_writes_nothing) {
  for (const Int8Kernels* kernels : machine_int8_kernels()) {
    float out = 7.0f;
    const int8_t w[4] = {};
    const float scale = 1.0f;
    int8_linear(*kernels, nullptr, ElementType::kFloat32, w, &scale, &out, ElementType::kFloat32, 0,
                1, 4, run_serially, kRanges);
    CHECK_EQ(out, 7.0f);
  }
}

}  // namespace
}  // namespace ellm
