// Linear layers over weights in panels, against float64 and against themselves in other company.
#include "kernels/cpu/panels.h"

#include <algorithm>

#include "check.h"
#include "kernel_fixtures.h"

namespace ellm {
namespace {

constexpr int64_t kRanges = 3;
constexpr ElementType kBf16 = ElementType::kBFloat16;

const uint16_t* bits(const Elements& e) { return reinterpret_cast<const uint16_t*>(e.at(0)); }

struct Problem {
  int64_t rows, n, k;
  ElementType x_type, out_type;
  Elements x, w, panels;

  Problem(int64_t rows, int64_t n, int64_t k, ElementType x_type, ElementType out_type,
          std::mt19937_64* random)
      : rows(rows),
        n(n),
        k(k),
        x_type(x_type),
        out_type(out_type),
        x(random_elements(x_type, rows * k, random)),
        w(random_elements(kBf16, n * k, random)),
        panels(w) {
    pack_panels(panels.at(0), n, k / 2);
  }

  // Rows [begin, end) as a batch of their own.
  Elements run(const Kernels& kernels, int64_t begin, int64_t end,
               const ParallelFor& parallel = run_serially) const {
    Elements part(x_type, (end - begin) * k);  // apart, so that reading past its end is an error
    part.copy(0, x, begin * k, (end - begin) * k);
    Elements out(out_type, (end - begin) * n);
    linear_panels(kernels, part.at(0), x_type, bits(panels), out.at(0), out_type, end - begin, n, k,
                  parallel, kRanges);
    return out;
  }
  Elements run(const Kernels& kernels) const { return run(kernels, 0, rows); }
};

void check_against_float64(const Kernels& kernels, const Problem& p) {
  const Elements out = p.run(kernels);
  for (int64_t m = 0; m < p.rows; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double exact = 0, size = 0;
      for (int64_t i = 0; i < p.k; ++i) {
        const double term = double{p.x.get(m * p.k + i)} * p.w.get(n * p.k + i);
        exact += term;
        size += std::fabs(term);
      }
      double bound = 1e-6 * size;
      if (p.out_type == kBf16) bound += std::fabs(exact) / 256;
      const double error = std::fabs(out.get(m * p.n + n) - exact);
      if (error <= bound) continue;
      std::cerr << kernels.isa << " " << p.rows << " " << p.n << " " << p.k << ": row " << m
                << " column " << n << ": " << out.get(m * p.n + n) << ", float64 " << exact << "\n";
      CHECK(error <= bound);
      return;
    }
  }
}

TEST(each_weight_has_its_place) {
  std::mt19937_64 random(check::seed);
  for (int64_t n : {1, 15, 64, 65, 130, 200}) {
    for (int64_t words : {1, 7, 16, 33}) {
      const Elements w = random_elements(ElementType::kFloat32, n * words, &random);
      Elements panels = w;
      pack_panels(panels.at(0), n, words);
      for (int64_t row = 0; row < n; ++row) {
        const int64_t first = row / kPanelOutputs * kPanelOutputs;
        const int64_t width = std::min(kPanelOutputs, n - first);
        for (int64_t i = 0; i < words; ++i) {
          const int64_t at = first * words + i * width + row - first;
          if (!CHECK(w.same(row * words + i, panels, at, 1))) return;
        }
      }
    }
  }
}

TEST(halves_alternate) {
  std::mt19937_64 random(check::seed);
  constexpr int64_t kHalf = kPanelOutputs / 2;
  constexpr int64_t kRow = 3;
  for (int64_t n : {64, 128, 192, 320, 1024}) {
    const Elements rows = random_elements(kBf16, n * kRow, &random);
    Elements moved = rows;
    alternate_halves(moved.at(0), n, kRow * element_bytes(kBf16));
    for (int64_t row = 0; row < n / 2; ++row) {
      const int64_t to = row / kHalf * kPanelOutputs + row % kHalf;
      CHECK(rows.same(row * kRow, moved, to * kRow, kRow));
      CHECK(rows.same((n / 2 + row) * kRow, moved, (to + kHalf) * kRow, kRow));
    }
  }
}

TEST(what_follows_in_a_call_is_the_same_as_after_it) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (int64_t rows : {1, 7, 40}) {
      for (int64_t n : {3, 64, 70, 192}) {
        for (int64_t k : {34, 2100}) {
          const Problem p(rows, n, k, kBf16, kBf16, &random);
          const Elements bias = random_elements(kBf16, n, &random);
          const Elements add = random_elements(kBf16, rows * n, &random);
          const Elements products = p.run(*kernels);
          for (int with : {1, 2, 3}) {
            const bool biased = (with & 1) != 0, added = (with & 2) != 0;
            Elements want = products;
            for (int64_t i = 0; i < rows * n; ++i) {
              if (biased) want.set(i, want.get(i) + bias.get(i % n));
              if (added) want.set(i, want.get(i) + add.get(i));
            }
            Elements out(kBf16, rows * n);
            linear_panels(*kernels, p.x.at(0), kBf16, bits(p.panels), out.at(0), kBf16, rows, n, k,
                          run_serially, kRanges,
                          {biased ? bits(bias) : nullptr, added ? bits(add) : nullptr, false});
            if (!CHECK(out.same(0, want, 0, rows * n))) return;
          }
        }
      }
    }
  }
}

TEST(gates_in_a_call_are_the_same_as_after_it) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (int64_t rows : {1, 7, 40, 300}) {
      for (int64_t n : {64, 192}) {
        const int64_t k = rows == 7 ? 2100 : 34;
        const Problem p(rows, n, k, kBf16, kBf16, &random);
        const Elements bias = random_elements(kBf16, n, &random);
        Elements products = p.run(*kernels);
        for (int64_t i = 0; i < rows * n; ++i) products.set(i, products.get(i) + bias.get(i % n));
        Elements want(kBf16, rows * n / 2);
        kernels->silu_mul(products.at(0), want.at(0), kBf16, rows, n / 2);
        Elements w = p.w, biases = bias, out(kBf16, rows * n / 2);
        alternate_halves(w.at(0), n, k * element_bytes(kBf16));
        alternate_halves(biases.at(0), n, element_bytes(kBf16));
        pack_panels(w.at(0), n, k / 2);
        linear_panels(*kernels, p.x.at(0), kBf16, bits(w), out.at(0), kBf16, rows, n, k,
                      threaded(4), kRanges, {bits(biases), nullptr, true});
        if (!CHECK(out.same(0, want, 0, want.size()))) return;
      }
    }
  }
}

TEST(panels_match_float64) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    int64_t rows = 0;
    for (int64_t n : {1, 3, 16, 17, 64, 67, 130, 256}) {
      for (int64_t k : {2, 6, 16, 34, 100, 258}) {
        rows = rows % 20 + 1;
        for (ElementType x : kTypes) {
          for (ElementType out : kTypes) {
            check_against_float64(*kernels, Problem(rows, n, k, x, out, &random));
          }
        }
      }
    }
    // More inputs than are taken at a time, and more rows than wait together.
    check_against_float64(*kernels, Problem(7, 70, 5002, kBf16, ElementType::kFloat32, &random));
    check_against_float64(*kernels, Problem(390, 66, 2052, kBf16, kBf16, &random));
  }
}

TEST(panel_rows_do_not_depend_on_the_batch) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (ElementType type : kTypes) {
      for (int64_t k : {24, 210, 2100}) {
        const Problem p(20, 75, k, type, ElementType::kFloat32, &random);
        const Elements all = p.run(*kernels);
        for (int64_t size = 1; size < p.rows; ++size) {
          for (int64_t begin : {int64_t{0}, p.rows - size, (p.rows - size) / 2}) {
            const Elements some = p.run(*kernels, begin, begin + size);
            if (!CHECK(some.same(0, all, begin * p.n, size * p.n))) return;
          }
        }
      }
    }
    const Problem many(200, 64, 2100, kBf16, kBf16, &random);
    const Elements all = many.run(*kernels);
    for (int64_t begin : {0, 150, 191, 192, 199}) {
      const Elements one = many.run(*kernels, begin, begin + 1);
      if (!CHECK(one.same(0, all, begin * many.n, many.n))) return;
    }
  }
}

// A column is the same number in a matrix of other columns: devices that share a matrix by its
// outputs compute what one would.
TEST(panel_columns_do_not_depend_on_the_matrix_around_them) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    const Problem p(9, 200, 136, kBf16, ElementType::kFloat32, &random);
    const Elements all = p.run(*kernels);
    for (int64_t begin : {0, 50, 64, 100, 137}) {
      const int64_t n = p.n - begin;
      Elements panels(kBf16, n * p.k), out(p.out_type, p.rows * n);
      panels.copy(0, p.w, begin * p.k, n * p.k);
      pack_panels(panels.at(0), n, p.k / 2);
      linear_panels(*kernels, p.x.at(0), p.x_type, bits(panels), out.at(0), p.out_type, p.rows, n,
                    p.k, run_serially, kRanges);
      for (int64_t m = 0; m < p.rows; ++m) {
        if (!CHECK(out.same(m * n, all, m * p.n + begin, n))) return;
      }
    }
  }
}

TEST(panels_on_threads_equal_serial) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (ElementType type : kTypes) {
      for (int64_t rows : {1, 5, 70}) {
        const Problem p(rows, 515, 136, type, type, &random);
        const Elements serial = p.run(*kernels);
        for (int repeat = 0; repeat < 3; ++repeat) {
          const Elements out = p.run(*kernels, 0, rows, threaded(4));
          if (!CHECK(out.same(0, serial, 0, serial.size()))) return;
        }
      }
    }
  }
}

// Rows that no vector fills are widened beside each other.
TEST(panels_of_uneven_rows_on_threads_equal_serial) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    const Problem p(300, 67, 262, ElementType::kBFloat16, ElementType::kBFloat16, &random);
    const Elements serial = p.run(*kernels);
    for (int repeat = 0; repeat < 3; ++repeat) {
      const Elements out = p.run(*kernels, 0, p.rows, threaded(4));
      if (!CHECK(out.same(0, serial, 0, serial.size()))) return;
    }
  }
}

TEST(panels_keep_nan_and_infinity_in_their_row) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (ElementType type : kTypes) {
      Problem p(11, 67, 50, type, type, &random);
      const Elements clean = p.run(*kernels);
      for (float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (int64_t at : {0, 49}) {
          Problem dirty = p;
          dirty.x.set(4 * p.k + at, bad);
          const Elements out = dirty.run(*kernels);
          CHECK(out.same(0, clean, 0, 4 * p.n));
          CHECK(out.same(5 * p.n, clean, 5 * p.n, 6 * p.n));
          for (int64_t n = 0; n < p.n; ++n) CHECK(!std::isfinite(out.get(4 * p.n + n)));
        }
      }
    }
  }
}

}  // namespace
}  // namespace ellm
