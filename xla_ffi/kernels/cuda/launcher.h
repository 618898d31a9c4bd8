// Launches kernels on a stream. For the files that nvcc compiles.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <atomic>
#include <string>

#include "kernels/cuda/launch.h"

namespace ellm::cuda {

inline Status cuda_status(cudaError_t code, const char* what) {
  if (code == cudaSuccess) return Status::Ok();
  return Status(Code::kDriver, std::string(what) + ": " + cudaGetErrorName(code) + ", " +
                                   cudaGetErrorString(code));
}

class StreamLauncher {
 public:
  // With `load_only`, kernels are made ready for the current device and nothing is launched.
  StreamLauncher(cudaStream_t stream, bool load_only) : stream_(stream), load_only_(load_only) {}

  // False too where the device cannot be asked: the kernels for any device do.
  bool has_warpgroup_products() const {
    int device = 0;
    int major = 0;
    return cudaGetDevice(&device) == cudaSuccess &&
           cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) ==
               cudaSuccess &&
           major == 9;
  }

  template <auto kKernel>
  Status launch(const LaunchShape& shape, const AttentionArgs& args) {
    int device = 0;
    if (Status s = cuda_status(cudaGetDevice(&device), "cudaGetDevice"); !s.ok()) return s;
    if (device < 0 || device >= kMostDevices) {
      return Status(Code::kInvalid, "device " + std::to_string(device) + " is beyond the " +
                                        std::to_string(kMostDevices) + " that are supported");
    }
    // Blocks that run at the same time on the device; 0: the kernel is not loaded there.
    static std::array<std::atomic<int>, kMostDevices> resident{};
    int most = resident[device].load(std::memory_order_relaxed);
    if (most == 0) {
      if (Status s = load(reinterpret_cast<const void*>(kKernel), shape, device, &most); !s.ok()) {
        return s;
      }
      resident[device].store(most, std::memory_order_relaxed);
    }
    if (load_only_ || shape.blocks == 0) return Status::Ok();
    const int64_t blocks = shape.persistent && shape.blocks > most ? most : shape.blocks;
    kKernel<<<static_cast<unsigned>(blocks), shape.threads, shape.shared_bytes, stream_>>>(args);
    return cuda_status(cudaGetLastError(), "the launch of an attention kernel");
  }

 private:
  static constexpr int kMostDevices = 64;

  static Status load(const void* kernel, const LaunchShape& shape, int device, int* most) {
    if (Status s =
            cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shape.shared_bytes)),
                        "asking for shared memory for an attention kernel");
        !s.ok()) {
      return s;
    }
    int multiprocessors = 0;
    if (Status s = cuda_status(
            cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
            "cudaDeviceGetAttribute");
        !s.ok()) {
      return s;
    }
    int blocks = 0;
    if (Status s = cuda_status(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
                                   &blocks, kernel, shape.threads, shape.shared_bytes),
                               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
        !s.ok()) {
      return s;
    }
    if (blocks == 0) {
      return Status(Code::kInvalid,
                    "an attention kernel with " + std::to_string(shape.shared_bytes) +
                        " bytes of shared memory does not fit a multiprocessor of device " +
                        std::to_string(device) + "; use a GPU of compute capability 8.0 or later");
    }
    *most = multiprocessors * blocks;
    return Status::Ok();
  }

  cudaStream_t stream_;
  bool load_only_;
};

}  // namespace ellm::cuda
