#include "fake_cuda.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>

#include "fake_cuda_functions.h"

namespace ellm {

using fake_cuda::number;
using fake_cuda::pointer;

namespace {

constexpr int kUnmappedFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

// A system call of the fake's own that has to work.
void must(bool worked, const char* call) {
  if (worked) return;
  std::perror(call);
  std::abort();
}

bool overlap(uintptr_t a, size_t a_bytes, uintptr_t b, size_t b_bytes) {
  return a < b + b_bytes && b < a + a_bytes;
}

}  // namespace

FakeCuda* FakeCuda::the_fake_ = nullptr;

FakeCuda::FakeCuda(const Options& options) : options_(options), api_(functions()) {
  must(the_fake_ == nullptr, "only one fake CUDA at a time");
  for (int i = 0; i < options.devices; ++i) {
    const int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    must(fd >= 0, "memfd_create");
    devices_.push_back({fd});
  }
  the_fake_ = this;
}

FakeCuda::~FakeCuda() {
  for (const Device& device : devices_) close(device.fd);
  the_fake_ = nullptr;
}

uint64_t FakeCuda::calls_of(const std::string& symbol) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto it = calls_.find(symbol);
  return it == calls_.end() ? 0 : it->second;
}

void FakeCuda::launch(int device, const void* at, size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  expect(whole_mappings(number(at), bytes), "a kernel touches memory that is not mapped");
  kernels_.push_back({device, number(at), bytes});
}

void FakeCuda::finish_kernels() {
  std::lock_guard<std::mutex> lock(mutex_);
  kernels_.clear();
}

size_t FakeCuda::used_bytes(int device) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return devices_[static_cast<size_t>(device)].used_bytes;
}

size_t FakeCuda::registered_bytes() const {
  std::lock_guard<std::mutex> lock(mutex_);
  size_t bytes = 0;
  for (const auto& [at, size] : registrations_) bytes += size;
  return bytes;
}

std::string FakeCuda::violations() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string all;
  for (const std::string& violation : violations_) all += violation + "\n";
  return all;
}

std::string FakeCuda::leftovers() const {
  std::lock_guard<std::mutex> lock(mutex_);
  int contexts = 0;
  for (const Device& device : devices_) contexts += device.context_references;
  std::string all;
  const auto count = [&](size_t n, const char* what) {
    if (n > 0) all += std::to_string(n) + " " + what + "\n";
  };
  count(static_cast<size_t>(contexts), "context references");
  count(ranges_.size(), "ranges");
  count(memory_.size(), "allocations");
  count(mappings_.size(), "mappings");
  count(registrations_.size(), "registrations");
  count(streams_.size(), "streams");
  count(events_.size(), "events");
  return all;
}

void FakeCuda::expect(bool rule, const std::string& broken) {
  if (!rule) violations_.insert(broken);
}

bool FakeCuda::reserved(uintptr_t at, size_t bytes) const {
  const auto after = ranges_.upper_bound(at);
  if (after == ranges_.begin()) return false;
  const auto range = std::prev(after);
  return at + bytes <= range->first + range->second;
}

bool FakeCuda::whole_mappings(uintptr_t at, size_t bytes) const {
  uintptr_t end = at;
  for (auto it = mappings_.find(at); it != mappings_.end() && end < at + bytes; ++it) {
    if (it->first != end) return false;
    end += it->second.bytes;
  }
  return bytes > 0 && end == at + bytes;
}

bool FakeCuda::registered(uintptr_t at, size_t bytes) const {
  const auto after = registrations_.upper_bound(at);
  if (after == registrations_.begin()) return false;
  const auto range = std::prev(after);
  return at + bytes <= range->first + range->second;
}

bool FakeCuda::touched(uintptr_t at, size_t bytes) const {
  for (const Kernel& kernel : kernels_) {
    if (overlap(kernel.at, kernel.bytes, at, bytes)) return true;
  }
  for (const auto& [handle, stream] : streams_) {
    for (const Copy& copy : stream.pending) {
      if (overlap(copy.to, copy.bytes, at, bytes) || overlap(copy.from, copy.bytes, at, bytes)) {
        return true;
      }
    }
  }
  return false;
}

void FakeCuda::forget_if_unused(std::map<cu::Allocation, Memory>::iterator memory) {
  const Memory& m = memory->second;
  if (m.references > 0 || m.mappings > 0) return;
  Device& device = devices_[static_cast<size_t>(m.device)];
  device.used_bytes -= m.bytes;
  must(fallocate(device.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                 static_cast<off_t>(m.offset), static_cast<off_t>(m.bytes)) == 0,
       "fallocate");
  memory_.erase(memory);
}

void FakeCuda::drop_mapping(std::map<uintptr_t, Mapping>::iterator mapping) {
  must(mmap(pointer(mapping->first), mapping->second.bytes, PROT_NONE, kUnmappedFlags | MAP_FIXED,
            -1, 0) != MAP_FAILED,
       "mmap");
  const auto memory = memory_.find(mapping->second.allocation);
  --memory->second.mappings;
  mappings_.erase(mapping);
  forget_if_unused(memory);
}

void FakeCuda::complete(StreamState* stream, uint64_t up_to) {
  while (!stream->pending.empty() && stream->pending.front().number <= up_to) {
    const Copy& copy = stream->pending.front();
    std::memcpy(pointer(copy.to), pointer(copy.from), copy.bytes);
    stream->pending.pop_front();
  }
}

cu::ReturnCode FakeCuda::enqueue(const char* symbol, uintptr_t device_end, uintptr_t host_end,
                                 const Copy& copy, cu::Stream stream) {
  const auto it = streams_.find(number(stream));
  if (it == streams_.end()) return cu::kInvalidValue;
  expect(current_device(symbol) == it->second.device, "a copy on another device's stream");
  expect(registered(host_end, copy.bytes), "a copy from or to host memory that is not pinned");
  const auto after = mappings_.upper_bound(device_end);
  const bool mapped = after != mappings_.begin();
  if (!mapped ||
      device_end + copy.bytes > std::prev(after)->first + std::prev(after)->second.bytes) {
    return cu::kInvalidValue;
  }
  const Mapping& mapping = std::prev(after)->second;
  expect(mapping.accessible, "a copy from or to a mapping without access");
  expect(memory_.at(mapping.allocation).device == it->second.device,
         "a copy from or to another device's memory");
  it->second.pending.push_back(copy);
  it->second.pending.back().number = ++it->second.submitted;
  return cu::kSuccess;
}

}  // namespace ellm
