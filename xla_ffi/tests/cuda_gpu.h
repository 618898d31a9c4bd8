// A fake GPU with the driver over it, for tests that are about CUDA.
#pragma once

#include <cstddef>
#include <memory>

#include "fake_cuda.h"
#include "fixtures.h"
#include "memory/cuda_driver.h"

namespace ellm {

inline constexpr size_t kMiB = size_t{1} << 20;
inline constexpr size_t kCudaChunk = 2 * kMiB;

// Checked in the end: no rule broken, nothing left.
struct Gpu {
  explicit Gpu(const FakeCuda::Options& options = {}) : fake(options) {}
  ~Gpu() {
    CHECK_EQ(fake.violations(), "");
    CHECK_EQ(fake.leftovers(), "");
  }

  std::shared_ptr<CudaDevice> device(int ordinal = 0) {
    auto device = CudaDevice::Open(fake.api(), ordinal);
    REQUIRE_OK(device.status());
    return device.value();
  }
  std::shared_ptr<CudaDriver> driver(int ordinal = 0) {
    auto driver = CudaDriver::Create(device(ordinal));
    REQUIRE_OK(driver.status());
    return driver.value();
  }

  FakeCuda fake;
};

inline bool says(const Status& s, const char* part) {
  return s.message().find(part) != std::string::npos;
}

}  // namespace ellm
