// Accuracy of exp and tanh and the rounding to bfloat16, for every instruction set.
#include "check.h"
#include "kernel_fixtures.h"
#include "vec_probe.h"

namespace ellm {

namespace generic {
VecProbe vec_probe();
}
#ifdef ELLM_X86
namespace avx2 {
VecProbe vec_probe();
}
namespace avx512 {
VecProbe vec_probe();
}
namespace avx512_bf16 {
VecProbe vec_probe();
}
#endif

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<VecProbe> probes() {
  std::vector<VecProbe> found = {generic::vec_probe()};
#ifdef ELLM_X86
  if (kernels_for("avx2")) found.push_back(avx2::vec_probe());
  if (kernels_for("avx512")) found.push_back(avx512::vec_probe());
  if (kernels_for("avx512_bf16")) found.push_back(avx512_bf16::vec_probe());
#endif
  return found;
}

// `count` values spread evenly over [low, high]; count is a multiple of 16.
std::vector<float> spread(double low, double high, int64_t count) {
  std::vector<float> x(count);
  for (int64_t i = 0; i < count; ++i) {
    x[i] = static_cast<float>(low + (high - low) * i / (count - 1));
  }
  return x;
}

template <class F>
float one(F function, float x) {
  std::vector<float> in(16, x), out(16);
  function(in.data(), 16, out.data());
  for (float y : out) CHECK(std::memcmp(&y, &out[0], sizeof y) == 0);
  return out[0];
}

TEST(exp_is_within_two_ulp) {
  for (const VecProbe& probe : probes()) {
    const std::vector<float> x = spread(-87.3, 88.3, 1 << 20);
    std::vector<float> y(x.size());
    probe.exp(x.data(), static_cast<int64_t>(x.size()), y.data());
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp(double{x[i]});
      const double ulp = std::ldexp(1.0, std::ilogb(static_cast<float>(exact)) - 23);
      worst = std::max(worst, std::fabs(y[i] - exact) / ulp);
    }
    std::printf("     exp, %s: %.2f ulp at most\n", probe.isa, worst);
    CHECK(worst <= 2.0);
  }
}

TEST(exp_at_the_edges) {
  for (const VecProbe& probe : probes()) {
    CHECK_EQ(one(probe.exp, 0.0f), 1.0f);
    CHECK_EQ(one(probe.exp, -0.0f), 1.0f);
    CHECK_EQ(one(probe.exp, -kInfinity), 0.0f);
    CHECK_EQ(one(probe.exp, -1e30f), 0.0f);
    CHECK_EQ(one(probe.exp, -87.4f), 0.0f);
    CHECK(std::isfinite(one(probe.exp, 1e30f)));  // saturates: softmax never exceeds 0
    CHECK(std::isnan(one(probe.exp, kNan)));
  }
}

TEST(exp2_negative_is_accurate) {
  for (const VecProbe& probe : probes()) {
    const std::vector<float> x = spread(-126.0, 0.0, 1 << 20);
    std::vector<float> full(x.size()), rounded(x.size());
    probe.exp2_negative(x.data(), static_cast<int64_t>(x.size()), full.data());
    probe.exp2_rounded(x.data(), static_cast<int64_t>(x.size()), rounded.data());
    double worst_ulp = 0, worst_relative = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double exact = std::exp2(double{x[i]});
      const double ulp = std::ldexp(1.0, std::ilogb(static_cast<float>(exact)) - 23);
      worst_ulp = std::max(worst_ulp, std::fabs(full[i] - exact) / ulp);
      worst_relative = std::max(worst_relative, std::fabs(rounded[i] - exact) / exact);
    }
    std::printf("     exp2, %s: %.2f ulp, and %.3g of it, at most\n", probe.isa, worst_ulp,
                worst_relative);
    CHECK(worst_ulp <= 4.0);
    CHECK(worst_relative <= 1.1e-4);
  }
}

TEST(exp2_negative_at_the_edges) {
  for (const VecProbe& probe : probes()) {
    for (const auto exp2 : {probe.exp2_negative, probe.exp2_rounded}) {
      CHECK_EQ(one(exp2, 0.0f), 1.0f);
      CHECK_EQ(one(exp2, -0.0f), 1.0f);
      for (int n = 1; n <= 126; ++n) {
        CHECK_EQ(one(exp2, -static_cast<float>(n)), std::ldexp(1.0f, -n));
      }
      CHECK_EQ(one(exp2, -126.1f), 0.0f);
      CHECK_EQ(one(exp2, -1e30f), 0.0f);
      CHECK_EQ(one(exp2, -kInfinity), 0.0f);
      CHECK(std::isnan(one(exp2, kNan)));
    }
  }
}

TEST(tanh_is_within_3e_7) {
  for (const VecProbe& probe : probes()) {
    const std::vector<float> x = spread(-20, 20, 1 << 20);
    std::vector<float> y(x.size());
    probe.tanh(x.data(), static_cast<int64_t>(x.size()), y.data());
    double worst = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      worst = std::max(worst, std::fabs(y[i] - std::tanh(double{x[i]})));
    }
    std::printf("     tanh, %s: %.2g at most\n", probe.isa, worst);
    CHECK(worst <= 3e-7);
  }
}

TEST(tanh_at_the_edges) {
  for (const VecProbe& probe : probes()) {
    CHECK_EQ(one(probe.tanh, 0.0f), 0.0f);
    for (float x : {30.0f, 1e30f, kInfinity}) {
      CHECK_EQ(one(probe.tanh, x), 1.0f);
      CHECK_EQ(one(probe.tanh, -x), -1.0f);
    }
    CHECK(std::isnan(one(probe.tanh, kNan)));
  }
}

TEST(to_bf16_rounds_to_nearest_even) {
  for (const VecProbe& probe : probes()) {
    for (uint32_t high = 0; high < 0x10000; ++high) {
      // Exact, just above, round the tie, and just below the next: denormals, the step to
      // infinity, infinities and NaNs are all among them.
      for (uint32_t low : {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
        const float x = bits_to_float(high << 16 | low);
        const uint16_t rounded = probe.to_bf16(x);
        if (!CHECK_EQ(rounded, nearest_bf16(x))) return;
        if (!CHECK_EQ(std::isnan(from_bf16(rounded)), std::isnan(x))) return;
        std::vector<float> in(16, x);
        std::vector<uint16_t> out(16);
        probe.store_bf16(in.data(), 16, out.data());
        for (uint16_t h : out) {
          if (!CHECK_EQ(h, rounded)) return;
        }
      }
    }
  }
}

}  // namespace
}  // namespace ellm
