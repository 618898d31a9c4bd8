// What an operating system or a device offers to build virtual tensors from.
#pragma once

#include <cstddef>
#include <cstdint>

#include "memory/status.h"

namespace ellm {

// Names a piece of physical memory; 0 is never a handle. Handles that follow each other in number
// are likely to be neighbours, which some drivers map more cheaply.
using Handle = uint64_t;

// Who can read and write what is mapped.
enum class Reach : uint8_t { kNobody, kHost, kDevice };

// Thread-safe. Every call may fail; unless it says kBroken, a failed call changed nothing.
// All addresses and sizes are multiples of granularity_bytes().
class Driver {
 public:
  virtual ~Driver() = default;

  virtual size_t granularity_bytes() const = 0;
  virtual Reach reach() const { return Reach::kHost; }
  // The only device that can touch what is mapped, as XLA numbers them; -1: the host can.
  virtual int ordinal() const { return -1; }

  // Takes `bytes` of addresses, with no memory behind them. `alignment` is a power of two.
  virtual Status reserve(size_t bytes, size_t alignment, std::byte** base) = 0;
  // Gives a whole reserved range back; nothing may be mapped in it.
  virtual Status release(std::byte* base, size_t bytes) = 0;

  // Takes physical memory, which is mapped nowhere yet. Its contents are undefined.
  virtual Status create(size_t bytes, Handle* handle) = 0;
  // The size of a large page: mapped from a multiple of it, as much memory from create_large() is
  // cheaper to map, and to reach for whoever goes through much of it. 0: there are none.
  virtual size_t large_bytes() const { return 0; }
  // Takes `n` handles of `chunk_bytes` each, neighbours from a multiple of large_bytes() on, in all
  // a multiple of it; in large pages as far as the system has them. All or nothing.
  virtual Status create_large(size_t chunk_bytes, size_t n, Handle* handles);
  // Gives it back to the system; it may be mapped nowhere.
  virtual Status destroy(Handle handle, size_t bytes) = 0;

  // Maps `n` handles of `chunk_bytes` each, side by side from `at`, in a reserved range where
  // nothing is mapped. A handle may be mapped at several addresses. All or nothing: after a
  // failure half-way, what was mapped is unmapped again, and kBroken says that this failed too.
  virtual Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) = 0;
  // Unmaps [at, at + bytes), which stays reserved; any access to it faults from then on. It begins
  // and ends where map() put a chunk's begin or end, and nothing touches it any more. After a
  // failure (its own, or kBroken from map) some of the range may be mapped and some not: calling it
  // again over such a range is allowed and unmaps what is left.
  virtual Status unmap(std::byte* at, size_t bytes) = 0;

  // Waits until nothing that was started before touches mapped memory any more: for whoever cannot
  // know it otherwise. Errors: kDriver, where some of what was started has failed.
  virtual Status synchronize() { return Status::Ok(); }
};

inline Status Driver::create_large(size_t, size_t, Handle*) {
  return Status(Code::kInvalid, "this driver has no large pages: take memory with create()");
}

}  // namespace ellm
