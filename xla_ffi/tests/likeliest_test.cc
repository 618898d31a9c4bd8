// The likeliest token, for every instruction set, against std::max_element.
#include <algorithm>

#include "check.h"
#include "kernel_fixtures.h"

namespace ellm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST(likeliest_is_the_first_of_the_largest_and_no_token_beside_a_nan) {
  std::mt19937 random(17);
  std::uniform_int_distribution<int> few(-3, 3);
  for (const Kernels* kernels : machine_kernels()) {
    for (int64_t n = 1; n < 100; ++n) {
      for (int round = 0; round < 20; ++round) {
        std::vector<float> x(n);
        for (float& v : x) v = static_cast<float>(few(random));
        if (round == 0) std::fill(x.begin(), x.end(), -kInfinity);
        if (round == 1) x[random() % n] = kInfinity;
        const int64_t want = std::max_element(x.begin(), x.end()) - x.begin();
        CHECK_EQ(kernels->likeliest(x.data(), n), want);
        x[random() % n] = kNan;
        CHECK_EQ(kernels->likeliest(x.data(), n), int64_t{-1});
      }
    }
  }
}

}  // namespace
}  // namespace ellm
