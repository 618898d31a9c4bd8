// The fake's memory: reserved, made, mapped, and registered on the host.
#include <sys/mman.h>
#include <unistd.h>

#include <iterator>

#include "fake_cuda_functions.h"

namespace ellm {

using fake_cuda::number;
using fake_cuda::pointer;

namespace {

bool is_power_of_two(size_t value) { return value != 0 && (value & (value - 1)) == 0; }

bool describes_device_memory(const cu::AllocationProp& prop) {
  return prop.type == cu::kAllocationPinned && prop.handle_types == 0 &&
         prop.location.type == cu::kLocationDevice && prop.win32_handle == nullptr &&
         prop.flags.usage == 0;
}

}  // namespace

cu::ReturnCode FakeCuda::Functions::granularity(size_t* bytes, const cu::AllocationProp* prop,
                                                int option) {
  const Call call("cuMemGetAllocationGranularity");
  if (call.fails) return cu::kUnknown;
  *bytes = call.fake.options_.granularity_bytes;
  return describes_device_memory(*prop) && option == cu::kGranularityMinimum ? cu::kSuccess
                                                                             : cu::kInvalidValue;
}

cu::ReturnCode FakeCuda::Functions::address_reserve(cu::Address* base, size_t bytes,
                                                    size_t alignment, cu::Address hint,
                                                    unsigned long long flags) {
  const Call call("cuMemAddressReserve");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  const size_t granularity = call.fake.options_.granularity_bytes;
  if (bytes == 0 || bytes % granularity != 0 || hint != 0 || flags != 0) return cu::kInvalidValue;
  if (alignment == 0) alignment = granularity;
  if (!is_power_of_two(alignment)) return cu::kInvalidValue;
  if (bytes > SIZE_MAX - alignment) return cu::kOutOfMemory;
  void* got = mmap(nullptr, bytes + alignment, PROT_NONE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (got == MAP_FAILED) return cu::kOutOfMemory;
  const uintptr_t begin = number(got);
  const uintptr_t aligned = (begin + alignment - 1) / alignment * alignment;
  if (aligned > begin) munmap(got, aligned - begin);
  munmap(pointer(aligned + bytes), begin + alignment - aligned);
  call.fake.ranges_.emplace(aligned, bytes);
  *base = aligned;
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::address_free(cu::Address base, size_t bytes) {
  const Call call("cuMemAddressFree");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  FakeCuda& fake = call.fake;
  const auto range = fake.ranges_.find(base);
  if (range == fake.ranges_.end() || range->second != bytes) return cu::kInvalidValue;
  const auto mapping = fake.mappings_.lower_bound(base);
  const bool mapped = mapping != fake.mappings_.end() && mapping->first < base + bytes;
  fake.expect(!mapped, "a range goes in which something is mapped");
  if (mapped) return cu::kInvalidValue;
  munmap(pointer(base), bytes);
  fake.ranges_.erase(range);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::create(cu::Allocation* allocation, size_t bytes,
                                           const cu::AllocationProp* prop,
                                           unsigned long long flags) {
  const Call call("cuMemCreate");
  if (call.fails) return cu::kUnknown;
  const int current = call.device();
  if (current < 0) return cu::kInvalidContext;
  if (bytes == 0 || bytes % call.fake.options_.granularity_bytes != 0 || flags != 0 ||
      !describes_device_memory(*prop)) {
    return cu::kInvalidValue;
  }
  const int id = prop->location.id;
  call.fake.expect(id == current, "memory is made on a device that is not current");
  if (id < 0 || id >= static_cast<int>(call.fake.devices_.size())) return cu::kInvalidDevice;
  Device& device = call.fake.devices_[static_cast<size_t>(id)];
  if (bytes > call.fake.options_.device_bytes - device.used_bytes) return cu::kOutOfMemory;
  Memory memory{id, device.end, bytes};
  device.end += bytes;
  device.used_bytes += bytes;
  if (ftruncate(device.fd, static_cast<off_t>(device.end)) != 0) return cu::kOutOfMemory;
  *allocation = (uint64_t{0xfa} << 40) + ++call.fake.last_handle_;
  call.fake.memory_.emplace(*allocation, memory);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::release(cu::Allocation allocation) {
  const Call call("cuMemRelease");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  const auto memory = call.fake.memory_.find(allocation);
  const bool exists = memory != call.fake.memory_.end() && memory->second.references > 0;
  call.fake.expect(exists, "release of no memory");
  if (!exists) return cu::kInvalidValue;
  const bool last = --memory->second.references == 0;
  call.fake.expect(!last || memory->second.mappings == 0, "memory is released while it is mapped");
  call.fake.forget_if_unused(memory);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::retain(cu::Allocation* allocation, void* at) {
  const Call call("cuMemRetainAllocationHandle");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  const auto after = call.fake.mappings_.upper_bound(number(at));
  if (after == call.fake.mappings_.begin()) return cu::kInvalidValue;
  const auto mapping = std::prev(after);
  if (number(at) >= mapping->first + mapping->second.bytes) return cu::kInvalidValue;
  *allocation = mapping->second.allocation;
  ++call.fake.memory_.at(*allocation).references;
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::map(cu::Address at, size_t bytes, size_t offset,
                                        cu::Allocation allocation, unsigned long long flags) {
  const Call call("cuMemMap");
  if (call.fails) return cu::kUnknown;
  const int current = call.device();
  if (current < 0) return cu::kInvalidContext;
  FakeCuda& fake = call.fake;
  const size_t granularity = fake.options_.granularity_bytes;
  const auto memory = fake.memory_.find(allocation);
  if (at % granularity != 0 || bytes == 0 || bytes % granularity != 0 || offset != 0 ||
      flags != 0 || memory == fake.memory_.end() || bytes > memory->second.bytes) {
    return cu::kInvalidValue;
  }
  fake.expect(memory->second.device == current, "memory of a device that is not current");
  fake.expect(fake.reserved(at, bytes), "map outside of every reserved range");
  const auto next = fake.mappings_.lower_bound(at);
  const bool free = (next == fake.mappings_.end() || next->first >= at + bytes) &&
                    (next == fake.mappings_.begin() ||
                     std::prev(next)->first + std::prev(next)->second.bytes <= at);
  fake.expect(free, "map over a mapping");
  if (!free || !fake.reserved(at, bytes)) return cu::kInvalidValue;
  const Device& device = fake.devices_[static_cast<size_t>(memory->second.device)];
  if (mmap(pointer(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, device.fd,
           static_cast<off_t>(memory->second.offset)) == MAP_FAILED) {
    return cu::kOutOfMemory;
  }
  ++memory->second.mappings;
  fake.mappings_.emplace(at, Mapping{bytes, allocation, false});
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::set_access(cu::Address at, size_t bytes,
                                               const cu::AccessDesc* access, size_t count) {
  const Call call("cuMemSetAccess");
  if (call.fails && !call.half_done()) return cu::kUnknown;
  const int current = call.device();
  if (current < 0) return cu::kInvalidContext;
  FakeCuda& fake = call.fake;
  if (count != 1 || access->location.type != cu::kLocationDevice ||
      access->flags != cu::kAccessReadWrite || !fake.whole_mappings(at, bytes)) {
    return cu::kInvalidValue;
  }
  fake.expect(access->location.id == current, "access for a device that is not current");
  const uintptr_t end = at + (call.fails ? bytes / 2 : bytes);
  for (auto it = fake.mappings_.find(at); it != fake.mappings_.end() && it->first < end; ++it) {
    if (mprotect(pointer(it->first), it->second.bytes, PROT_READ | PROT_WRITE) != 0) {
      return cu::kOutOfMemory;
    }
    it->second.accessible = true;
  }
  return call.fails ? cu::kUnknown : cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::unmap(cu::Address at, size_t bytes) {
  const Call call("cuMemUnmap");
  if (call.fails && !call.half_done()) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  FakeCuda& fake = call.fake;
  if (!fake.whole_mappings(at, bytes)) {
    const auto after = fake.mappings_.upper_bound(at);
    const bool cut = after != fake.mappings_.begin() && std::prev(after)->first != at &&
                     std::prev(after)->first + std::prev(after)->second.bytes > at;
    fake.expect(!cut, "unmap of a part of a mapping");
    return cu::kInvalidValue;
  }
  fake.expect(!fake.touched(at, bytes), "unmap of what a kernel or a copy touches");
  const uintptr_t end = at + (call.fails ? bytes / 2 : bytes);
  auto it = fake.mappings_.find(at);
  while (it != fake.mappings_.end() && it->first + it->second.bytes <= end) {
    fake.drop_mapping(it++);
  }
  return call.fails ? cu::kUnknown : cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::host_register(void* at, size_t bytes, unsigned flags) {
  const Call call("cuMemHostRegister_v2");
  if (call.fails) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  call.fake.expect(flags == cu::kRegisterPortable, "pinned memory that is not portable");
  for (const auto& [begin, size] : call.fake.registrations_) {
    if (begin < number(at) + bytes && number(at) < begin + size) return cu::kAlreadyRegistered;
  }
  call.fake.registrations_.emplace(number(at), bytes);
  return cu::kSuccess;
}

cu::ReturnCode FakeCuda::Functions::host_unregister(void* at) {
  const Call call("cuMemHostUnregister");
  if (call.fails && !call.half_done()) return cu::kUnknown;
  if (call.device() < 0) return cu::kInvalidContext;
  const auto registration = call.fake.registrations_.find(number(at));
  if (registration == call.fake.registrations_.end()) return cu::kNotRegistered;
  call.fake.expect(!call.fake.touched(number(at), registration->second),
                   "unpinning of what a copy touches");
  call.fake.registrations_.erase(registration);
  return call.fails ? cu::kUnknown : cu::kSuccess;
}

}  // namespace ellm
