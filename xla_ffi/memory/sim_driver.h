// Driver without memory: what a simulator and tests build virtual tensors from.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "memory/driver.h"

namespace ellm {

// Addresses and handles are numbers nobody may touch; the calls keep books only. A broken rule of
// the driver (map over a mapping, destroy of what is mapped, ...) is a bug in the caller and ends
// the process with a message. A call that is told to fail does nothing.
class SimDriver : public Driver {
 public:
  size_t granularity_bytes() const override { return 4096; }
  Reach reach() const override { return Reach::kNobody; }
  Status reserve(size_t bytes, size_t alignment, std::byte** base) override;
  Status release(std::byte* base, size_t bytes) override;
  Status create(size_t bytes, Handle* handle) override;
  Status destroy(Handle handle, size_t bytes) override;
  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override;
  Status unmap(std::byte* at, size_t bytes) override;

  // From now on each call fails with probability `rate`, drawn from the seed; 0 ends it.
  // Errors: kInvalid outside of [0, 1].
  Status inject_faults(uint64_t seed, double rate);
  // The n-th call from now fails, on top of those drawn; the next one is 1. Replaces an earlier
  // fail_call that has not come to pass. Errors: kInvalid for 0.
  Status fail_call(uint64_t n);
  // Calls so far, failed ones included.
  uint64_t calls() const;

 private:
  struct Memory {
    size_t bytes;
    size_t mappings;
  };
  struct Mapping {
    Handle handle;
    size_t bytes;
  };

  // The functions below are called with the lock held.
  Status count_call(const char* verb);
  bool drawn_to_fail();
  bool reserved(uint64_t at, size_t bytes) const;

  mutable std::mutex mutex_;
  uint64_t calls_ = 0;
  uint64_t failing_call_ = 0;  // 0: none.
  uint64_t random_ = 0;        // State of splitmix64.
  double rate_ = 0;
  uint64_t next_address_ = uint64_t{1} << 60;  // No processor takes such an address.
  Handle last_handle_ = 0;
  std::map<uint64_t, size_t> ranges_;  // Bytes by address.
  std::unordered_map<Handle, Memory> memory_;
  std::map<uint64_t, Mapping> mappings_;  // By address.
};

}  // namespace ellm
