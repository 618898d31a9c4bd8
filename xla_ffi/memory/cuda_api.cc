#include "memory/cuda_api.h"

#include <dlfcn.h>

namespace ellm {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";

Result<CudaApi> load_and_initialize() {
  Result<CudaApi> api = load_cuda_library(kLibrary);
  if (!api.ok()) return api;
  if (const cu::ReturnCode code = api.value().init(0); code != cu::kSuccess) {
    const Status failure = cuda_error(api.value(), code, "cannot initialise CUDA");
    return Status(Code::kDriver, failure.message() +
                                     "; see whether nvidia-smi lists a GPU, or use device=\"cpu\"");
  }
  return api;
}

// Whether the context is gone: from such an error on every call in it fails.
bool is_fatal(cu::ReturnCode code) {
  return code == cu::kEccUncorrectable || code == cu::kIllegalAddress ||
         code == cu::kLaunchTimeout || code == cu::kAssert ||
         (code >= cu::kHardwareStackError && code <= cu::kLaunchFailed);
}

const char* remedy(cu::ReturnCode code) {
  if (is_fatal(code)) {
    return "; the device or a kernel on it has failed, and the process cannot use it any more: "
           "start it anew";
  }
  if (code == cu::kOutOfMemory) {
    return "; the device is short of memory: lower device_memory, or end what else runs on it";
  }
  return "";
}

}  // namespace

Result<CudaApi> load_cuda_library(const char* path) {
  // Never closed: threads of the driver outlive whoever opened it.
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return Status(Code::kDriver, std::string("there is no CUDA driver here: ") + dlerror() +
                                     "; install the NVIDIA driver, or use device=\"cpu\"");
  }
  CudaApi api{};
  const char* missing = nullptr;
#define ELLM_FIND(member, symbol, parameters)                                        \
  api.member = reinterpret_cast<decltype(CudaApi::member)>(dlsym(library, #symbol)); \
  if (api.member == nullptr && missing == nullptr) missing = #symbol;
  ELLM_CUDA_FUNCTIONS(ELLM_FIND)
#undef ELLM_FIND
  if (missing != nullptr) {
    return Status(Code::kDriver, std::string(path) + " has no function " + missing +
                                     "; install an NVIDIA driver for CUDA 12 or later");
  }
  return api;
}

Result<const CudaApi*> load_cuda() {
  // Never destroyed: threads of objects that nobody ends may call it while the process ends.
  static const auto* const loaded = new Result<CudaApi>(load_and_initialize());
  if (!loaded->ok()) return loaded->status();
  return &loaded->value();
}

Status cuda_error(const CudaApi& api, cu::ReturnCode code, const std::string& what) {
  const char* name = nullptr;
  const char* text = nullptr;
  const bool known = api.error_name(code, &name) == cu::kSuccess && name != nullptr &&
                     api.error_string(code, &text) == cu::kSuccess && text != nullptr;
  return Status(Code::kDriver,
                what + ": " +
                    (known ? std::string(name) + " (" + text + ")"
                           : "error " + std::to_string(code) + " of the CUDA driver") +
                    remedy(code));
}

}  // namespace ellm
