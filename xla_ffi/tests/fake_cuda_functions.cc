// The fake's devices, contexts, streams and events.
#include "fake_cuda_functions.h"

#include <cstdio>

namespace ellm {

using fake_cuda::number;

namespace {

thread_local std::vector<int> current_devices;  // Of the contexts pushed on this thread.

}  // namespace

CudaApi FakeCuda::functions() {
  current_devices.clear();  // What an earlier fake was not allowed to pop.
  CudaApi api;
#define ELLM_FUNCTION(member, symbol, parameters) api.member = &Functions::member;
  ELLM_CUDA_FUNCTIONS(ELLM_FUNCTION)
#undef ELLM_FUNCTION
  return api;
}

int FakeCuda::current_device(const char* symbol) {
  const bool any = !current_devices.empty();
  expect(any, std::string(symbol) + " without a current context");
  if (!any) return -1;
  const int device = current_devices.back();
  const bool alive = devices_[static_cast<size_t>(device)].context_references > 0;
  expect(alive, std::string(symbol) + " with a context that was released");
  return alive ? device : -1;
}

cu::ReturnCode FakeCuda::Functions::init(unsigned flags) {
  const Call call("cuInit");
  if (call.fails) return cu::kUnknown;
  call.fake.initialized_ = true;
  return flags == 0 ? cu::kSuccess : cu::kInvalidValue;
}

cu::ReturnCode FakeCuda::Functions::error_name(cu::ReturnCode code, const char** name) {
  switch (code) {
    case cu::kInvalidValue:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return cu::kSuccess;
    case cu::kOutOfMemory:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      return cu::kSuccess;
    case cu::kUnknown:
      *name = "CUDA_ERROR_UNKNOWN";
      return cu::kSuccess;
    default:
      *name = nullptr;
      return cu::kInvalidValue;
  }
}

cu::ReturnCode FakeCuda::Functions::error_string(cu::ReturnCode code, const char** text) {
  *text = code == cu::kOutOfMemory ? "out of memory" : "as the fake was told";
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::device_count(int* count) {
  const Call call("cuDeviceGetCount");
  if (call.fails) return cu::kUnknown;
  *count = static_cast<int>(call.fake.devices_.size());
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::device_get(cu::Device* device, int ordinal) {
  const Call call("cuDeviceGet");
  if (call.fails) return cu::kUnknown;
  *device = ordinal;
  const bool exists = ordinal >= 0 && ordinal < static_cast<int>(call.fake.devices_.size());
  return exists ? cu::kSuccess : cu::kInvalidDevice;
}

cu::ReturnCode FakeCuda::Functions::device_name(char* name, int capacity, cu::Device device) {
  const Call call("cuDeviceGetName");
  if (call.fails) return cu::kUnknown;
  std::snprintf(name, static_cast<size_t>(capacity), "Fake GPU %d", device);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::device_attribute(int* value, int attribute, cu::Device) {
  const Call call("cuDeviceGetAttribute");
  if (call.fails) return cu::kUnknown;
  switch (attribute) {
    case cu::kAttributeMajor:
      *value = 9;
      return cu::kSuccess;
    case cu::kAttributeMinor:
      *value = 0;
      return cu::kSuccess;
    case cu::kAttributeVirtualMemory:
      *value = call.fake.options_.virtual_memory;
      return cu::kSuccess;
    default:
      return cu::kInvalidValue;
  }
}

cu::ReturnCode FakeCuda::Functions::device_bytes(size_t* bytes, cu::Device) {
  const Call call("cuDeviceTotalMem_v2");
  if (call.fails) return cu::kUnknown;
  *bytes = call.fake.options_.device_bytes;
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::context_retain(cu::Context* context, cu::Device device) {
  const Call call("cuDevicePrimaryCtxRetain");
  if (call.fails) return cu::kUnknown;
  ++call.fake.devices_[static_cast<size_t>(device)].context_references;
  *context = reinterpret_cast<cu::Context>(static_cast<uintptr_t>(device) + 1);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::context_release(cu::Device device) {
  const Call call("cuDevicePrimaryCtxRelease_v2");
  if (call.fails) return cu::kUnknown;
  int& references = call.fake.devices_[static_cast<size_t>(device)].context_references;
  call.fake.expect(references > 0, "release of a context that nobody holds");
  --references;
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::context_push(cu::Context context) {
  const Call call("cuCtxPushCurrent_v2");
  if (call.fails) return cu::kUnknown;
  current_devices.push_back(static_cast<int>(number(context)) - 1);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::context_pop(cu::Context* context) {
  const Call call("cuCtxPopCurrent_v2");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  *context = reinterpret_cast<cu::Context>(static_cast<uintptr_t>(current_devices.back()) + 1);
  current_devices.pop_back();
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::context_synchronize() {
  const Call call("cuCtxSynchronize");
  if (call.fails) return cu::kUnknown;
  const int device = call.device();
  if (device < 0) return cu::kInvalidContext;
  std::vector<Kernel> others;
  for (const Kernel& kernel : call.fake.kernels_) {
    if (kernel.device != device) others.push_back(kernel);
  }
  call.fake.kernels_ = others;
  for (auto& [handle, stream] : call.fake.streams_) {
    if (stream.device == device) call.fake.complete(&stream, stream.submitted);
  }
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::memory_info(size_t* free_bytes, size_t* total_bytes) {
  const Call call("cuMemGetInfo_v2");
  if (call.fails) return cu::kUnknown;
  const int device = call.device();
  if (device < 0) return cu::kInvalidContext;
  *total_bytes = call.fake.options_.device_bytes;
  *free_bytes = *total_bytes - call.fake.devices_[static_cast<size_t>(device)].used_bytes;
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::copy_to_host(void* to, cu::Address from, size_t bytes,
                                                 cu::Stream stream) {
  const Call call("cuMemcpyDtoHAsync_v2");
  if (call.fails) return cu::kUnknown;
  const Copy copy{number(to), static_cast<uintptr_t>(from), bytes, 0};
  return call.fake.enqueue("cuMemcpyDtoHAsync_v2", copy.from, copy.to, copy, stream);
}

cu::ReturnCode FakeCuda::Functions::copy_to_device(cu::Address to, const void* from, size_t bytes,
                                                   cu::Stream stream) {
  const Call call("cuMemcpyHtoDAsync_v2");
  if (call.fails) return cu::kUnknown;
  const Copy copy{static_cast<uintptr_t>(to), number(from), bytes, 0};
  return call.fake.enqueue("cuMemcpyHtoDAsync_v2", copy.to, copy.from, copy, stream);
}

cu::ReturnCode FakeCuda::Functions::stream_create(cu::Stream* stream, unsigned flags) {
  const Call call("cuStreamCreate");
  if (call.fails) return cu::kUnknown;
  const int device = call.device();
  if (device < 0) return cu::kInvalidContext;
  call.fake.expect(flags == cu::kStreamNonBlocking, "a stream that waits for the legacy stream");
  *stream = reinterpret_cast<cu::Stream>(static_cast<uintptr_t>(++call.fake.last_handle_));
  call.fake.streams_[number(*stream)].device = device;
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::stream_synchronize(cu::Stream stream) {
  const Call call("cuStreamSynchronize");
  if (call.fails) return cu::kUnknown;
  const auto it = call.fake.streams_.find(number(stream));
  if (it == call.fake.streams_.end()) return cu::kInvalidValue;
  call.fake.complete(&it->second, it->second.submitted);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::stream_destroy(cu::Stream stream) {
  const Call call("cuStreamDestroy_v2");
  if (call.fails) return cu::kUnknown;
  const auto it = call.fake.streams_.find(number(stream));
  if (it == call.fake.streams_.end()) return cu::kInvalidValue;
  call.fake.expect(it->second.pending.empty(), "a stream goes with copies under way");
  call.fake.streams_.erase(it);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::event_create(cu::Event* event, unsigned flags) {
  const Call call("cuEventCreate");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  call.fake.expect((flags & cu::kEventBlockingSync) != 0, "an event whose waiting spins");
  *event = reinterpret_cast<cu::Event>(static_cast<uintptr_t>(++call.fake.last_handle_));
  call.fake.events_[number(*event)] = {};
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::event_record(cu::Event event, cu::Stream stream) {
  const Call call("cuEventRecord");
  if (call.fails) return cu::kUnknown;
  const auto e = call.fake.events_.find(number(event));
  const auto s = call.fake.streams_.find(number(stream));
  if (e == call.fake.events_.end() || s == call.fake.streams_.end()) return cu::kInvalidValue;
  e->second = {s->first, s->second.submitted};
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::event_synchronize(cu::Event event) {
  const Call call("cuEventSynchronize");
  if (call.fails) return cu::kUnknown;
  const auto e = call.fake.events_.find(number(event));
  if (e == call.fake.events_.end()) return cu::kInvalidValue;
  const auto s = call.fake.streams_.find(e->second.stream);
  if (s != call.fake.streams_.end()) call.fake.complete(&s->second, e->second.number);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::event_destroy(cu::Event event) {
  const Call call("cuEventDestroy_v2");
  if (call.fails) return cu::kUnknown;
  return call.fake.events_.erase(number(event)) == 1 ? cu::kSuccess : cu::kInvalidValue;
}

}  // namespace ellm
