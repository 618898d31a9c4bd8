// A CUDA driver without a GPU: the functions of CudaApi over host memory, with CUDA's rules.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "faults.h"
#include "memory/cuda_api.h"

namespace ellm {

// "Device" memory is a file in memory, mapped where the real driver would map it, so that tests
// read and write it through its addresses. What CUDA refuses is refused with CUDA's code; what it
// leaves undefined, or lets pass but this library must not do, is noted as a violation:
//  - the context of the right device has to be current wherever memory is made, mapped or copied;
//  - mapped memory cannot be touched before access was set, and goes only as a whole mapping;
//  - nothing is mapped over a mapping or outside of a reserved range, no range with a mapping goes,
//    no memory is released for the last time while it is mapped;
//  - memory that a kernel or a copy in flight touches is neither unmapped nor unregistered;
//  - copies are from or to registered host memory, and move no byte before somebody waits for them.
//
// The functions of the table have no place for an object, so there is one fake at a time.
// Thread-safe.
class FakeCuda {
 public:
  struct Options {
    size_t granularity_bytes = size_t{2} << 20;
    size_t device_bytes = size_t{1} << 30;
    int devices = 1;
    bool virtual_memory = true;
  };

  explicit FakeCuda(const Options& options);
  ~FakeCuda();
  FakeCuda(const FakeCuda&) = delete;
  FakeCuda& operator=(const FakeCuda&) = delete;

  const CudaApi& api() const { return api_; }

  // Of all functions but those that explain an error; a failed one says CUDA_ERROR_UNKNOWN.
  // kHalfDone: unmapping of several chunks stops after half of them, setting access likewise;
  // unregistering is done, and the error is one of an earlier call.
  FaultPlan& faults() { return faults_; }
  // Calls of a function so far, by its symbol.
  uint64_t calls_of(const std::string& symbol) const;

  // A kernel starts on this device that touches [at, at + bytes), until the context is synchronised
  // or finish_kernels() is called.
  void launch(int device, const void* at, size_t bytes);
  void finish_kernels();

  size_t used_bytes(int device) const;
  size_t registered_bytes() const;
  // Rules that a caller has broken, one per line; empty if none.
  std::string violations() const;
  // What exists now, other than contexts that were left current; empty if nothing.
  std::string leftovers() const;

 private:
  struct Functions;  // What api_ points to.
  static CudaApi functions();
  static FakeCuda* the_fake_;

  struct Device {
    int fd;
    size_t used_bytes = 0;
    size_t end = 0;  // Of what was ever handed out in the file.
    int context_references = 0;
  };
  struct Memory {
    int device;
    size_t offset;
    size_t bytes;
    int references = 1;
    int mappings = 0;
  };
  struct Mapping {
    size_t bytes;
    cu::Allocation allocation;
    bool accessible;
  };
  struct Kernel {
    int device;
    uintptr_t at;
    size_t bytes;
  };
  struct Copy {
    uintptr_t to, from;
    size_t bytes;
    uint64_t number;  // In its stream, from 1.
  };
  struct StreamState {
    int device;
    std::deque<Copy> pending;
    uint64_t submitted = 0;
  };
  struct EventState {
    uintptr_t stream = 0;  // 0: not recorded.
    uint64_t number = 0;
  };

  // The functions below are called with the lock held.
  void expect(bool rule, const std::string& broken);
  // The device whose context is current on this thread; -1: none, which is a violation.
  int current_device(const char* symbol);
  bool reserved(uintptr_t at, size_t bytes) const;
  // Whether mappings cover [at, at + bytes) without a gap and none sticks out.
  bool whole_mappings(uintptr_t at, size_t bytes) const;
  bool registered(uintptr_t at, size_t bytes) const;
  // Whether a kernel or copy in flight touches the range.
  bool touched(uintptr_t at, size_t bytes) const;
  void drop_mapping(std::map<uintptr_t, Mapping>::iterator mapping);
  void forget_if_unused(std::map<cu::Allocation, Memory>::iterator memory);
  void complete(StreamState* stream, uint64_t up_to);
  cu::ReturnCode enqueue(const char* symbol, uintptr_t device_end, uintptr_t host_end,
                         const Copy& copy, cu::Stream stream);

  const Options options_;
  const CudaApi api_;
  FaultPlan faults_;
  mutable std::mutex mutex_;
  bool initialized_ = false;
  std::map<std::string, uint64_t> calls_;
  std::vector<Device> devices_;
  std::map<uintptr_t, size_t> ranges_;
  std::map<cu::Allocation, Memory> memory_;
  std::map<uintptr_t, Mapping> mappings_;
  std::map<uintptr_t, size_t> registrations_;
  std::vector<Kernel> kernels_;
  std::map<uintptr_t, StreamState> streams_;
  std::map<uintptr_t, EventState> events_;
  uint64_t last_handle_ = 0;
  std::set<std::string> violations_;
};

}  // namespace ellm
