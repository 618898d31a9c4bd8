// The devices that memory can be on, by name: "cpu", "cuda:0", "cuda:1", ...
#pragma once

#include <memory>
#include <string>

#include "memory/copy_link.h"
#include "memory/cuda_device.h"
#include "memory/driver.h"

namespace ellm {

// Which one is meant. Errors: kInvalid for a name that is none.
struct DeviceName {
  bool is_cuda = false;
  int ordinal = 0;
};
Result<DeviceName> parse_device(const std::string& name);

// All errors below: kInvalid (no such device), kDriver (the system or the CUDA driver refuses).

Result<std::shared_ptr<CudaDevice>> open_cuda(int ordinal);
// What chunks of the device are made of.
Result<std::shared_ptr<Driver>> open_device_memory(const std::string& device);
// Host memory for copies to and from the device: pinned for a CUDA device.
Result<std::shared_ptr<Driver>> open_host_memory(const std::string& device);
// Copies between the two.
Result<std::unique_ptr<CopyLink>> open_link(const std::string& device);

}  // namespace ellm
