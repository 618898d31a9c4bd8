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
  // The runtime keeps the code until it is asked for: the next launch would look like a failed one.
  (void)cudaGetLastError();
  return Status(Code::kDriver, std::string(what) + ": " + cudaGetErrorName(code) + ", " +
                                   cudaGetErrorString(code));
}

class StreamLauncher {
 public:
  // With `load_only`, kernels are made ready for the current device and nothing is launched.
  StreamLauncher(cudaStream_t stream, bool load_only) : stream_(stream), load_only_(load_only) {}

  // False too where the device cannot be asked: the kernels for any device do. So they do in a
  // build without code for sm_90a, where those for Hopper would be made of code that traps.
  bool has_warpgroup_products() const {
#if defined(ELLM_SM90A)
    int device = 0;
    int major = 0;
    return cuda_status(cudaGetDevice(&device), "cudaGetDevice").ok() &&
           attribute(cudaDevAttrComputeCapabilityMajor, device, &major).ok() && major == 9;
#else
    return false;
#endif
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
    int allowed = 0;
    if (Status s = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, &allowed); !s.ok()) {
      return s;
    }
    if (shape.shared_bytes > allowed) {
      return Status(Code::kInvalid,
                    "an attention kernel takes " + std::to_string(shape.shared_bytes) +
                        " bytes of shared memory, and device " + std::to_string(device) + " has " +
                        std::to_string(allowed) +
                        " for a block; use a GPU of compute capability 8.0 or 9.0, or the CPU");
    }
    if (Status s =
            cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shape.shared_bytes)),
                        "asking for shared memory for an attention kernel");
        !s.ok()) {
      return s;
    }
    // The same for all kernels of a call: a multiprocessor divides its memory anew only between
    // kernels that want it otherwise.
    if (Status s =
            cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                             cudaSharedmemCarveoutMaxShared),
                        "asking for most memory of a multiprocessor to be shared memory");
        !s.ok()) {
      return s;
    }
    int multiprocessors = 0;
    if (Status s = attribute(cudaDevAttrMultiProcessorCount, device, &multiprocessors); !s.ok()) {
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
                    "an attention kernel of " + std::to_string(shape.threads) + " threads and " +
                        std::to_string(shape.shared_bytes) +
                        " bytes of shared memory does not fit a multiprocessor of device " +
                        std::to_string(device) +
                        "; use a GPU of compute capability 8.0 or 9.0, or the CPU");
    }
    *most = multiprocessors * blocks;
    return Status::Ok();
  }

  static Status attribute(cudaDeviceAttr which, int device, int* value) {
    return cuda_status(cudaDeviceGetAttribute(value, which, device), "cudaDeviceGetAttribute");
  }

  cudaStream_t stream_;
  bool load_only_;
};

}  // namespace ellm::cuda
