// Functions that the host and the device compile alike, so that a CPU can test them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ELLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ELLM_HOST_DEVICE inline
#endif

namespace ellm::cuda {

ELLM_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
ELLM_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
ELLM_HOST_DEVICE constexpr int32_t at_least(int32_t a, int32_t b) { return a > b ? a : b; }
ELLM_HOST_DEVICE constexpr int32_t at_most(int32_t a, int32_t b) { return a < b ? a : b; }

// Division by a number that is known when a kernel is launched, as a multiplication. Exact for
// dividends from 0 to 2^31 - 1 (Granlund and Montgomery, "Division by invariant integers using
// multiplication", 1994).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int32_t divisor) : divisor_(divisor) {
    const uint64_t d = static_cast<uint64_t>(divisor);
    while ((uint64_t{1} << shift_) < d) ++shift_;
    multiplier_ =
        static_cast<uint32_t>((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - d) / d + 1);
  }

  ELLM_HOST_DEVICE int32_t value() const { return divisor_; }
  ELLM_HOST_DEVICE int32_t quotient(int32_t n) const {
    const uint32_t dividend = static_cast<uint32_t>(n);
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(dividend, multiplier_);
#else
    const uint32_t high = static_cast<uint32_t>((uint64_t{dividend} * multiplier_) >> 32);
#endif
    return static_cast<int32_t>((high + dividend) >> shift_);
  }
  ELLM_HOST_DEVICE int32_t remainder(int32_t n) const { return n - quotient(n) * divisor_; }

 private:
  int32_t divisor_ = 1;
  uint32_t multiplier_ = 1;
  uint32_t shift_ = 0;
};

}  // namespace ellm::cuda
