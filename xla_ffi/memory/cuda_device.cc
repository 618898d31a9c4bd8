#include "memory/cuda_device.h"

#include <utility>

namespace ellm {

Result<std::shared_ptr<CudaDevice>> CudaDevice::Open(const CudaApi& api, int ordinal) {
  const std::string name = "cuda:" + std::to_string(ordinal);
  int count = 0;
  if (const auto code = api.device_count(&count); code != cu::kSuccess) {
    return cuda_error(api, code, "cannot count the CUDA devices");
  }
  if (ordinal < 0 || ordinal >= count) {
    return Status(Code::kInvalid, "there is no device " + name + "; there are " +
                                      std::to_string(count) + ", from cuda:0");
  }
  cu::Device id;
  if (const auto code = api.device_get(&id, ordinal); code != cu::kSuccess) {
    return cuda_error(api, code, "cannot open " + name);
  }
  cu::Context context;
  if (const auto code = api.context_retain(&context, id); code != cu::kSuccess) {
    return cuda_error(api, code, "cannot make the primary context of " + name);
  }
  return std::shared_ptr<CudaDevice>(new CudaDevice(api, ordinal, id, context));
}

CudaDevice::~CudaDevice() { (void)api_.context_release(id_); }  // At worst it lives on.

CudaDevice::Current::Current(const CudaDevice& device)
    : device_(device), code_(device.api_.context_push(device.context_)) {}

CudaDevice::Current::~Current() {
  cu::Context ours;
  if (code_ == cu::kSuccess) (void)device_.api_.context_pop(&ours);  // Else it stays current.
}

Status CudaDevice::Current::status() const {
  if (code_ == cu::kSuccess) return Status::Ok();
  return cuda_error(device_.api_, code_, "cannot use the context of " + device_.name());
}

namespace {

// What can be asked without a context.
Result<CudaDeviceInfo> describe(const CudaApi& api, int ordinal) {
  CudaDeviceInfo info{};
  char name[256] = {};
  cu::Device id;
  auto code = api.device_get(&id, ordinal);
  if (code == cu::kSuccess) code = api.device_name(name, sizeof name - 1, id);
  if (code == cu::kSuccess) {
    code = api.device_attribute(&info.capability_major, cu::kAttributeMajor, id);
  }
  if (code == cu::kSuccess) {
    code = api.device_attribute(&info.capability_minor, cu::kAttributeMinor, id);
  }
  if (code == cu::kSuccess) code = api.device_bytes(&info.total_bytes, id);
  if (code != cu::kSuccess) {
    return cuda_error(api, code, "cannot ask cuda:" + std::to_string(ordinal) + " what it is");
  }
  info.name = name;
  return info;
}

// 0 where there cannot be a context.
size_t free_bytes(const CudaApi& api, int ordinal) {
  const auto device = CudaDevice::Open(api, ordinal);
  if (!device.ok()) return 0;
  const CudaDevice::Current current(*device.value());
  size_t free = 0, total = 0;
  if (!current.status().ok() || api.memory_info(&free, &total) != cu::kSuccess) return 0;
  return free;
}

}  // namespace

Result<std::vector<CudaDeviceInfo>> list_cuda_devices(const CudaApi& api) {
  int count = 0;
  if (const auto code = api.device_count(&count); code != cu::kSuccess) {
    return cuda_error(api, code, "cannot count the CUDA devices");
  }
  std::vector<CudaDeviceInfo> infos;
  for (int ordinal = 0; ordinal < count; ++ordinal) {
    auto info = describe(api, ordinal);
    if (!info.ok()) return info.status();
    info.value().free_bytes = free_bytes(api, ordinal);
    infos.push_back(std::move(info.value()));
  }
  return infos;
}

}  // namespace ellm
