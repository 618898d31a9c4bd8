// Compares our declarations of the CUDA driver API with cuda.h. There is nothing to run: built, it
// has passed.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "memory/cuda_api.h"

namespace ellm {
namespace {

// As the calling convention sees it: pointers are pointers, and numbers of a size are the same.
template <class Ours, class Theirs>
constexpr bool same_value =
    sizeof(Ours) == sizeof(Theirs) && std::is_pointer_v<Ours> == std::is_pointer_v<Theirs> &&
    !std::is_floating_point_v<Ours> && !std::is_floating_point_v<Theirs>;

template <class Ours, class Theirs>
struct SameCall : std::false_type {};
template <class R, class... Ours, class S, class... Theirs>
struct SameCall<R (*)(Ours...), S (*)(Theirs...)> {
  static constexpr bool value = [] {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
      return (same_value<R, S> && ... && same_value<Ours, Theirs>);
    }
    return false;
  }();
};

#define ELLM_CHECK(member, symbol, parameters)                                   \
  static_assert(SameCall<decltype(CudaApi::member), decltype(&::symbol)>::value, \
                #symbol " is declared otherwise");
ELLM_CUDA_FUNCTIONS(ELLM_CHECK)
#undef ELLM_CHECK

static_assert(sizeof(cu::Location) == sizeof(CUmemLocation));
static_assert(offsetof(cu::Location, type) == offsetof(CUmemLocation, type));
static_assert(offsetof(cu::Location, id) == offsetof(CUmemLocation, id));
static_assert(sizeof(cu::AccessDesc) == sizeof(CUmemAccessDesc));
static_assert(offsetof(cu::AccessDesc, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(cu::AllocationProp) == sizeof(CUmemAllocationProp));
static_assert(offsetof(cu::AllocationProp, handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(cu::AllocationProp, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(cu::AllocationProp, win32_handle) ==
              offsetof(CUmemAllocationProp, win32HandleMetaData));
static_assert(offsetof(cu::AllocationProp, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(cu::AllocationProp::flags) == sizeof(CUmemAllocationProp::allocFlags));
static_assert(std::is_same_v<cu::Address, CUdeviceptr>);
static_assert(std::is_same_v<cu::Allocation, CUmemGenericAllocationHandle>);
static_assert(std::is_same_v<cu::Device, CUdevice>);

static_assert(cu::kSuccess == CUDA_SUCCESS);
static_assert(cu::kInvalidValue == CUDA_ERROR_INVALID_VALUE);
static_assert(cu::kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(cu::kInvalidDevice == CUDA_ERROR_INVALID_DEVICE);
static_assert(cu::kInvalidContext == CUDA_ERROR_INVALID_CONTEXT);
static_assert(cu::kIllegalAddress == CUDA_ERROR_ILLEGAL_ADDRESS);
static_assert(cu::kEccUncorrectable == CUDA_ERROR_ECC_UNCORRECTABLE);
static_assert(cu::kLaunchTimeout == CUDA_ERROR_LAUNCH_TIMEOUT);
static_assert(cu::kAssert == CUDA_ERROR_ASSERT);
static_assert(cu::kHardwareStackError == CUDA_ERROR_HARDWARE_STACK_ERROR);
static_assert(cu::kLaunchFailed == CUDA_ERROR_LAUNCH_FAILED);
static_assert(cu::kAlreadyRegistered == CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
static_assert(cu::kNotRegistered == CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
static_assert(cu::kUnknown == CUDA_ERROR_UNKNOWN);
static_assert(cu::kAllocationPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(cu::kLocationDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(cu::kAccessReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(cu::kGranularityMinimum == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(cu::kAttributeMajor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(cu::kAttributeMinor == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(cu::kAttributeVirtualMemory ==
              CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
static_assert(cu::kStreamNonBlocking == CU_STREAM_NON_BLOCKING);
static_assert(cu::kEventBlockingSync == CU_EVENT_BLOCKING_SYNC);
static_assert(cu::kEventDisableTiming == CU_EVENT_DISABLE_TIMING);
static_assert(cu::kRegisterPortable == CU_MEMHOSTREGISTER_PORTABLE);

}  // namespace
}  // namespace ellm
