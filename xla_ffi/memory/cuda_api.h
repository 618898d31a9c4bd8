// The CUDA driver API, as far as it is used here, found when it is first asked for: one build of
// the library imports with and without a GPU.
#pragma once

#include <cstddef>
#include <string>

#include "memory/status.h"

namespace ellm {

// What cuda.h declares, in our own words, so that building needs no CUDA. Where cuda.h is to be
// had, tests/cuda_header_check.cc compares the two.
namespace cu {

using ReturnCode = int;
using Device = int;
using Context = struct ContextTag*;
using Stream = struct StreamTag*;
using Event = struct EventTag*;
using Address = unsigned long long;     // Of device memory.
using Allocation = unsigned long long;  // Physical memory, mapped or not.

struct Location {
  int type;
  int id;
};

struct AllocationProp {
  int type;
  int handle_types;  // 0: not to be shared with other processes.
  Location location;
  void* win32_handle;
  struct {
    unsigned char compression;
    unsigned char rdma;
    unsigned short usage;
    unsigned char reserved[4];
  } flags;
};

struct AccessDesc {
  Location location;
  int flags;
};

inline constexpr ReturnCode kSuccess = 0;
inline constexpr ReturnCode kInvalidValue = 1;
inline constexpr ReturnCode kOutOfMemory = 2;
inline constexpr ReturnCode kInvalidDevice = 101;
inline constexpr ReturnCode kInvalidContext = 201;
inline constexpr ReturnCode kEccUncorrectable = 214;
inline constexpr ReturnCode kIllegalAddress = 700;
inline constexpr ReturnCode kLaunchTimeout = 702;
inline constexpr ReturnCode kAssert = 710;
inline constexpr ReturnCode kAlreadyRegistered = 712;
inline constexpr ReturnCode kNotRegistered = 713;
inline constexpr ReturnCode kHardwareStackError =
    714;  // Up to kLaunchFailed a kernel's own faults.
inline constexpr ReturnCode kLaunchFailed = 719;
inline constexpr ReturnCode kUnknown = 999;

inline constexpr int kAllocationPinned = 1;
inline constexpr int kLocationDevice = 1;
inline constexpr int kAccessReadWrite = 3;
inline constexpr int kGranularityMinimum = 0;
inline constexpr int kAttributeMajor = 75;
inline constexpr int kAttributeMinor = 76;
inline constexpr int kAttributeVirtualMemory = 102;
inline constexpr unsigned kStreamNonBlocking = 1;
inline constexpr unsigned kEventBlockingSync = 1;
inline constexpr unsigned kEventDisableTiming = 2;
inline constexpr unsigned kRegisterPortable = 1;

}  // namespace cu

// X(member, symbol, parameters). The symbols are those of the library, version suffix included,
// which it keeps for ever; the names without one are macros of cuda.h.
#define ELLM_CUDA_FUNCTIONS(X)                                                              \
  X(init, cuInit, (unsigned flags))                                                         \
  X(error_name, cuGetErrorName, (cu::ReturnCode code, const char** name))                   \
  X(error_string, cuGetErrorString, (cu::ReturnCode code, const char** text))               \
  X(device_count, cuDeviceGetCount, (int* count))                                           \
  X(device_get, cuDeviceGet, (cu::Device * device, int ordinal))                            \
  X(device_name, cuDeviceGetName, (char* name, int capacity, cu::Device device))            \
  X(device_attribute, cuDeviceGetAttribute, (int* value, int attribute, cu::Device device)) \
  X(device_bytes, cuDeviceTotalMem_v2, (size_t* bytes, cu::Device device))                  \
  X(context_retain, cuDevicePrimaryCtxRetain, (cu::Context * context, cu::Device device))   \
  X(context_release, cuDevicePrimaryCtxRelease_v2, (cu::Device device))                     \
  X(context_push, cuCtxPushCurrent_v2, (cu::Context context))                               \
  X(context_pop, cuCtxPopCurrent_v2, (cu::Context * context))                               \
  X(context_synchronize, cuCtxSynchronize, ())                                              \
  X(memory_info, cuMemGetInfo_v2, (size_t* free_bytes, size_t* total_bytes))                \
  X(granularity, cuMemGetAllocationGranularity,                                             \
    (size_t* bytes, const cu::AllocationProp* prop, int option))                            \
  X(address_reserve, cuMemAddressReserve,                                                   \
    (cu::Address * base, size_t bytes, size_t alignment, cu::Address hint,                  \
     unsigned long long flags))                                                             \
  X(address_free, cuMemAddressFree, (cu::Address base, size_t bytes))                       \
  X(create, cuMemCreate,                                                                    \
    (cu::Allocation * allocation, size_t bytes, const cu::AllocationProp* prop,             \
     unsigned long long flags))                                                             \
  X(release, cuMemRelease, (cu::Allocation allocation))                                     \
  X(retain, cuMemRetainAllocationHandle, (cu::Allocation * allocation, void* at))           \
  X(map, cuMemMap,                                                                          \
    (cu::Address at, size_t bytes, size_t offset, cu::Allocation allocation,                \
     unsigned long long flags))                                                             \
  X(set_access, cuMemSetAccess,                                                             \
    (cu::Address at, size_t bytes, const cu::AccessDesc* access, size_t count))             \
  X(unmap, cuMemUnmap, (cu::Address at, size_t bytes))                                      \
  X(host_register, cuMemHostRegister_v2, (void* at, size_t bytes, unsigned flags))          \
  X(host_unregister, cuMemHostUnregister, (void* at))                                       \
  X(copy_to_host, cuMemcpyDtoHAsync_v2,                                                     \
    (void* to, cu::Address from, size_t bytes, cu::Stream stream))                          \
  X(copy_to_device, cuMemcpyHtoDAsync_v2,                                                   \
    (cu::Address to, const void* from, size_t bytes, cu::Stream stream))                    \
  X(stream_create, cuStreamCreate, (cu::Stream * stream, unsigned flags))                   \
  X(stream_synchronize, cuStreamSynchronize, (cu::Stream stream))                           \
  X(stream_destroy, cuStreamDestroy_v2, (cu::Stream stream))                                \
  X(event_create, cuEventCreate, (cu::Event * event, unsigned flags))                       \
  X(event_record, cuEventRecord, (cu::Event event, cu::Stream stream))                      \
  X(event_synchronize, cuEventSynchronize, (cu::Event event))                               \
  X(event_destroy, cuEventDestroy_v2, (cu::Event event))

struct CudaApi {
#define ELLM_MEMBER(member, symbol, parameters) cu::ReturnCode(*member) parameters;
  ELLM_CUDA_FUNCTIONS(ELLM_MEMBER)
#undef ELLM_MEMBER
};

// The functions of a shared library that is or plays libcuda. Errors: kDriver (no such library, or
// one of the functions is missing).
Result<CudaApi> load_cuda_library(const char* path);

// Those of this machine's driver, initialised. Loaded once per process, and so is the error.
// Errors: kDriver; the message says why there is no CUDA and what to do.
Result<const CudaApi*> load_cuda();

// What went wrong in CUDA's words, after `what` was tried: "cannot map 3 chunks of 2 MiB". kDriver.
Status cuda_error(const CudaApi& api, cu::ReturnCode code, const std::string& what);

}  // namespace ellm
