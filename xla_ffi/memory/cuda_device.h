// A CUDA device with its primary context, the one that JAX uses too.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "memory/cuda_api.h"
#include "memory/status.h"

namespace ellm {

// Thread-safe. Keeps the primary context alive; JAX and every other user in the process share it,
// so that its addresses are good in their kernels. Where JAX is to choose the context's flags, it
// has to be initialised first.
class CudaDevice {
 public:
  // `api` outlives the device. Errors: kInvalid (no such device), kDriver.
  static Result<std::shared_ptr<CudaDevice>> Open(const CudaApi& api, int ordinal);
  ~CudaDevice();
  CudaDevice(const CudaDevice&) = delete;
  CudaDevice& operator=(const CudaDevice&) = delete;

  // The context is current on this thread for as long as it lives, whatever was before.
  class Current {
   public:
    explicit Current(const CudaDevice& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;
    Status status() const;

   private:
    const CudaDevice& device_;
    const cu::ReturnCode code_;
  };

  const CudaApi& api() const { return api_; }
  int ordinal() const { return ordinal_; }
  cu::Device id() const { return id_; }
  // "cuda:0", as in messages and in Python.
  std::string name() const { return "cuda:" + std::to_string(ordinal_); }

 private:
  CudaDevice(const CudaApi& api, int ordinal, cu::Device id, cu::Context context)
      : api_(api), ordinal_(ordinal), id_(id), context_(context) {}

  const CudaApi& api_;
  const int ordinal_;
  const cu::Device id_;
  const cu::Context context_;
};

struct CudaDeviceInfo {
  std::string name;  // Of the product.
  size_t total_bytes;
  size_t free_bytes;  // Now, by the driver's count, for all processes; 0: it has no room for us.
  int capability_major, capability_minor;
};

// By ordinal. Makes the primary context of each device for as long as it takes to ask what is free,
// which costs some tenths of a second where nobody else in the process has it. A device that
// refuses one (it is full, or another process has it for itself) is listed with nothing free.
// Errors: kDriver.
Result<std::vector<CudaDeviceInfo>> list_cuda_devices(const CudaApi& api);

}  // namespace ellm
