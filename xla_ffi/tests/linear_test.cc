// Linear layers against float64, and the equality of a row's bits whatever else is computed.
#include "kernels/cpu/linear.h"

#include "check.h"
#include "kernel_fixtures.h"

namespace ellm {
namespace {

// Parts in which the columns are handed out; not the number of threads anywhere.
constexpr int64_t kRanges = 3;

struct Problem {
  int64_t rows, n, k;
  ElementType x_type, w_type, out_type;
  Elements x, w;

  Problem(int64_t rows, int64_t n, int64_t k, ElementType x_type, ElementType w_type,
          ElementType out_type, std::mt19937_64* random)
      : rows(rows),
        n(n),
        k(k),
        x_type(x_type),
        w_type(w_type),
        out_type(out_type),
        x(random_elements(x_type, rows * k, random)),
        w(random_elements(w_type, n * k, random)) {}

  std::string name(const Kernels& kernels) const {
    std::string text = kernels.isa;
    for (int64_t size : {rows, n, k}) text += " " + std::to_string(size);
    for (ElementType type : {x_type, w_type, out_type}) text += std::string(" ") + type_name(type);
    return text;
  }

  // Rows [begin, end) as a batch of their own.
  Elements run(const Kernels& kernels, int64_t begin, int64_t end,
               const ParallelFor& parallel = run_serially) const {
    Elements part(x_type, (end - begin) * k);  // apart, so that reading past its end is an error
    part.copy(0, x, begin * k, (end - begin) * k);
    Elements out(out_type, (end - begin) * n);
    linear(kernels, part.at(0), x_type, w.at(0), w_type, out.at(0), out_type, end - begin, n, k,
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
      if (p.out_type == ElementType::kBFloat16) bound += std::fabs(exact) / 256;
      const double error = std::fabs(out.get(m * p.n + n) - exact);
      if (error <= bound) continue;
      std::cerr << p.name(kernels) << ": row " << m << " column " << n << ": "
                << out.get(m * p.n + n) << ", float64 " << exact << "\n";
      CHECK(error <= bound);
      return;
    }
  }
}

bool same_rows(const Elements& a, int64_t a_row, const Elements& b, int64_t b_row, int64_t rows,
               int64_t n) {
  return a.same(a_row * n, b, b_row * n, rows * n);
}

TEST(linear_matches_float64) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    int64_t rows = 0;
    for (int64_t n : {1, 3, 16, 17, 67, 130}) {
      for (int64_t k : {1, 7, 16, 33, 64, 100, 257}) {
        rows = rows % 20 + 1;
        for (ElementType x : kTypes) {
          for (ElementType w : kTypes) {
            for (ElementType out : kTypes) {
              check_against_float64(*kernels, Problem(rows, n, k, x, w, out, &random));
            }
          }
        }
      }
    }
    for (rows = 1; rows <= 20; ++rows) {
      check_against_float64(*kernels,
                            Problem(rows, 37, 83, ElementType::kFloat32, ElementType::kFloat32,
                                    ElementType::kFloat32, &random));
    }
    check_against_float64(*kernels,
                          Problem(7, 70, 5003, ElementType::kFloat32, ElementType::kBFloat16,
                                  ElementType::kFloat32, &random));
  }
}

TEST(linear_rows_do_not_depend_on_the_batch) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (ElementType type : kTypes) {
      for (int64_t k : {24, 209, 2100}) {
        const Problem p(20, 75, k, type, type, ElementType::kFloat32, &random);
        const Elements all = p.run(*kernels);
        for (int64_t m = 0; m < p.rows; ++m) {
          if (!CHECK(same_rows(p.run(*kernels, m, m + 1), 0, all, m, 1, p.n))) return;
        }
        for (int64_t size = 2; size < p.rows; ++size) {
          const int64_t begin = p.rows - size;
          if (!CHECK(same_rows(p.run(*kernels, 0, size), 0, all, 0, size, p.n))) return;
          if (!CHECK(same_rows(p.run(*kernels, begin, p.rows), 0, all, begin, size, p.n))) return;
        }
      }
    }
  }
}

TEST(linear_columns_do_not_depend_on_how_they_are_handed_out) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (int64_t rows : {1, 2, 3, 7, 13}) {
      const Problem p(rows, 97, 144, ElementType::kFloat32, ElementType::kBFloat16,
                      ElementType::kFloat32, &random);
      const Elements all = p.run(*kernels);
      for (int64_t width : {1, 2, 5, 31}) {
        Elements out(ElementType::kFloat32, rows * p.n);
        const LinearArgs args = {p.x.at(0), p.x_type,   p.k,  p.w.at(0), p.w_type,
                                 out.at(0), p.out_type, rows, p.n,       p.k};
        for (int64_t n = 0; n < p.n; n += width) {
          kernels->linear(args, {n, std::min(p.n, n + width), std::min(p.n, n + 2 * width), n > 0});
        }
        if (!CHECK(out.same(0, all, 0, all.size()))) return;
      }
    }
  }
}

TEST(linear_on_threads_equals_serial) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (ElementType type : kTypes) {
      for (int64_t rows : {1, 5, 70}) {
        const Problem p(rows, 515, 136, type, type, type, &random);
        const Elements serial = p.run(*kernels);
        for (int repeat = 0; repeat < 3; ++repeat) {
          const Elements out = p.run(*kernels, 0, rows, threaded(4));
          if (!CHECK(out.same(0, serial, 0, serial.size()))) return;
        }
      }
    }
  }
}

TEST(linear_keeps_nan_and_infinity_in_their_row) {
  std::mt19937_64 random(check::seed);
  for (const Kernels* kernels : machine_kernels()) {
    for (ElementType type : kTypes) {
      Problem p(11, 37, 50, type, type, type, &random);
      const Elements clean = p.run(*kernels);
      for (float bad :
           {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
        for (int64_t at : {0, 49}) {
          Problem dirty = p;
          dirty.x.set(4 * p.k + at, bad);
          const Elements out = dirty.run(*kernels);
          CHECK(same_rows(out, 0, clean, 0, 4, p.n));
          CHECK(same_rows(out, 5, clean, 5, 6, p.n));
          for (int64_t n = 0; n < p.n; ++n) CHECK(!std::isfinite(out.get(4 * p.n + n)));
        }
      }
    }
  }
}

TEST(linear_of_nothing_writes_nothing) {
  for (const Kernels* kernels : machine_kernels()) {
    float out = 7.0f;
    const float w[4] = {};
    linear(*kernels, nullptr, ElementType::kFloat32, w, ElementType::kFloat32, &out,
           ElementType::kFloat32, 0, 1, 4, run_serially, kRanges);
    CHECK_EQ(out, 7.0f);
  }
}

}  // namespace
}  // namespace ellm
