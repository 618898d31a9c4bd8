// Driver over the memory of a Linux host: one memfd holds all chunks, mmap puts them at addresses.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>

#include "memory/driver.h"
#include "memory/mapping_table.h"

namespace ellm {

// A handle is the offset of its memory in the file. Neighbouring offsets at neighbouring addresses
// are one mapping for the kernel, of which a process may have vm.max_map_count (usually 65530), so
// create() prefers the offset after the last one. At that limit even unmapping fails, and so do
// malloc and threads: map() refuses at three quarters of it.
class HostDriver : public Driver {
 public:
  static Result<std::shared_ptr<HostDriver>> Create();
  ~HostDriver() override;

  size_t granularity_bytes() const override { return page_bytes_; }
  Status reserve(size_t bytes, size_t alignment, std::byte** base) override;
  Status release(std::byte* base, size_t bytes) override;
  // Takes the memory here, so that a lack of it is an error here and not a SIGBUS at first touch.
  Status create(size_t bytes, Handle* handle) override;
  // Large pages are the transparent ones of memory files (Linux 6.1 on), which are asked for by
  // name: whether the system gives them to such files by itself does not matter.
  size_t large_bytes() const override { return large_bytes_; }
  Status create_large(size_t chunk_bytes, size_t n, Handle* handles) override;
  Status destroy(Handle handle, size_t bytes) override;
  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override;
  Status unmap(std::byte* at, size_t bytes) override;

 private:
  HostDriver(int fd, size_t page_bytes, size_t large_bytes, size_t max_mappings)
      : fd_(fd),
        page_bytes_(page_bytes),
        large_bytes_(large_bytes),
        max_mappings_(max_mappings),
        end_(page_bytes) {}

  Status check_size(const char* verb, size_t bytes) const;
  // Takes the memory of an extent of its own; gives the extent back where there is none.
  Status take_memory(Handle extent, size_t bytes);
  // Has the system put large pages into it, if it can: what it does not get stays empty.
  void take_large_pages(Handle extent, size_t bytes);
  // The functions below are called with the lock held.
  Status check_map(const Handle* handles, size_t n, size_t chunk_bytes) const;
  Handle take_extent(size_t bytes);
  Handle take_aligned_extent(size_t bytes);
  void free_extent(Handle handle, size_t bytes);

  const int fd_;
  const size_t page_bytes_;
  const size_t large_bytes_;
  const size_t max_mappings_;
  std::mutex mutex_;
  std::map<Handle, size_t> live_;  // Bytes by offset: what create() gave out.
  std::map<Handle, size_t> gaps_;  // Bytes by offset: unused extents below end_, none touching.
  Handle end_;                     // Page 0 stays unused, so that no handle is 0.
  Handle after_last_ = 0;
  MappingTable mappings_;
};

}  // namespace ellm
