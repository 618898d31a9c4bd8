#include "memory/host_driver.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#include "memory/text.h"

namespace ellm {
namespace {

constexpr int kReservedFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which older headers do not have.

Status system_error(const std::string& what, int error, const char* remedy) {
  std::string message = what + ": " + std::strerror(error);
  if (error == ENOMEM || error == ENOSPC) message += std::string("; ") + remedy;
  return Status(Code::kDriver, std::move(message));
}

// A signal, such as a profiler's, may interrupt the long work of fallocate.
int fallocate_fully(int fd, int mode, off_t offset, off_t bytes) {
  int rc;
  do {
    rc = fallocate(fd, mode, offset, bytes);
  } while (rc != 0 && errno == EINTR);
  return rc == 0 ? 0 : errno;
}

size_t max_map_count() {
  size_t count = 65530;  // The kernel's default, should /proc be hidden.
  std::ifstream("/proc/sys/vm/max_map_count") >> count;
  return count;
}

// The size of a transparent large page; 0 without them.
size_t large_page_bytes() {
  size_t bytes = 0;
  std::ifstream("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") >> bytes;
  return bytes;
}

// The end of the run of neighbours that starts with handle `first`.
size_t run_end(const Handle* handles, size_t first, size_t n, size_t chunk_bytes) {
  size_t last = first + 1;
  while (last < n && handles[last] == handles[last - 1] + chunk_bytes) ++last;
  return last;
}

}  // namespace

Result<std::shared_ptr<HostDriver>> HostDriver::Create() {
  const int fd = memfd_create("ellm-chunks", MFD_CLOEXEC);
  if (fd < 0) {
    return system_error("cannot make an anonymous memory file (memfd_create)", errno,
                        "free some memory");
  }
  return std::shared_ptr<HostDriver>(new HostDriver(fd, static_cast<size_t>(sysconf(_SC_PAGESIZE)),
                                                    large_page_bytes(), max_map_count() / 4 * 3));
}

HostDriver::~HostDriver() { close(fd_); }

Status HostDriver::check_size(const char* verb, size_t bytes) const {
  if (bytes != 0 && bytes % page_bytes_ == 0) return Status::Ok();
  return Status(Code::kInvalid, std::string("cannot ") + verb + " " + human_bytes(bytes) +
                                    ": memory comes in pages of " + human_bytes(page_bytes_) +
                                    "; pass a positive multiple");
}

Status HostDriver::reserve(size_t bytes, size_t alignment, std::byte** base) {
  if (Status s = check_size("reserve", bytes); !s.ok()) return s;
  if (alignment == 0 || (alignment & (alignment - 1)) != 0) {
    return Status(Code::kInvalid, "an alignment of " + std::to_string(alignment) +
                                      " is not a power of two; pass the chunk size");
  }
  // The kernel aligns to pages: take more and cut both ends off.
  const size_t slack = alignment > page_bytes_ ? alignment - page_bytes_ : 0;
  if (bytes > SIZE_MAX - slack) {
    return Status(Code::kInvalid, "cannot reserve " + human_bytes(bytes) +
                                      " of addresses; lower the number of slots or their length");
  }
  void* got = mmap(nullptr, bytes + slack, PROT_NONE, kReservedFlags, -1, 0);
  if (got == MAP_FAILED) {
    return system_error("cannot reserve " + human_bytes(bytes) + " of addresses", errno,
                        "lower the number of slots or their length, or raise `ulimit -v`");
  }
  const auto start = reinterpret_cast<uintptr_t>(got);
  const size_t head = (alignment - start % alignment) % alignment;
  auto* const aligned = static_cast<std::byte*>(got) + head;
  // Cutting an end off a range of our own cannot fail in a way that harms: it stays reserved.
  if (head > 0) munmap(got, head);
  if (slack > head) munmap(aligned + bytes, slack - head);
  *base = aligned;
  return Status::Ok();
}

Status HostDriver::release(std::byte* base, size_t bytes) {
  if (Status s = check_size("release", bytes); !s.ok()) return s;
  if (munmap(base, bytes) != 0) {
    return system_error("cannot release " + human_bytes(bytes) + " of addresses", errno,
                        "raise vm.max_map_count");
  }
  return Status::Ok();
}

Handle HostDriver::take_extent(size_t bytes) {
  auto gap = gaps_.find(after_last_);
  if (gap == gaps_.end() || gap->second < bytes) {
    const bool grow = after_last_ == end_;
    gap = gaps_.begin();
    while (!grow && gap != gaps_.end() && gap->second < bytes) ++gap;
    if (grow) gap = gaps_.end();
  }
  Handle handle = end_;
  if (gap == gaps_.end()) {
    end_ += bytes;
  } else {
    handle = gap->first;
    const size_t rest = gap->second - bytes;
    gaps_.erase(gap);
    if (rest > 0) gaps_.emplace(handle + bytes, rest);
  }
  after_last_ = handle + bytes;
  return handle;
}

Handle HostDriver::take_aligned_extent(size_t bytes) {
  const auto aligned = [this](Handle handle) {
    return (handle + large_bytes_ - 1) / large_bytes_ * large_bytes_;
  };
  auto gap = gaps_.begin();
  while (gap != gaps_.end() && aligned(gap->first) + bytes > gap->first + gap->second) ++gap;
  Handle begin = end_;
  Handle handle = aligned(end_);
  Handle end = handle + bytes;
  if (gap == gaps_.end()) {
    end_ = end;
  } else {
    begin = gap->first;
    handle = aligned(begin);
    end = begin + gap->second;
    gaps_.erase(gap);
  }
  if (begin < handle) gaps_.emplace(begin, handle - begin);
  if (handle + bytes < end) gaps_.emplace(handle + bytes, end - handle - bytes);
  return handle;
}

void HostDriver::free_extent(Handle handle, size_t bytes) {
  auto next = gaps_.lower_bound(handle);
  if (next != gaps_.end() && next->first == handle + bytes) {
    bytes += next->second;
    next = gaps_.erase(next);
  }
  if (next != gaps_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == handle) {
      handle = before->first;
      bytes += before->second;
      gaps_.erase(before);
    }
  }
  if (handle + bytes == end_) {
    end_ = handle;
  } else {
    gaps_.emplace(handle, bytes);
  }
}

Status HostDriver::create(size_t bytes, Handle* handle) {
  if (Status s = check_size("create", bytes); !s.ok()) return s;
  Handle taken;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    taken = take_extent(bytes);
  }
  if (Status s = take_memory(taken, bytes); !s.ok()) return s;
  std::lock_guard<std::mutex> lock(mutex_);
  live_.emplace(taken, bytes);
  *handle = taken;
  return Status::Ok();
}

Status HostDriver::create_large(size_t chunk_bytes, size_t n, Handle* handles) {
  if (Status s = check_size("create", chunk_bytes); !s.ok()) return s;
  const size_t bytes = n * chunk_bytes;
  if (large_bytes_ == 0 || bytes == 0 || bytes % large_bytes_ != 0) {
    return Status(Code::kInvalid, "cannot create " + human_bytes(bytes) + " in large pages of " +
                                      human_bytes(large_bytes_) + "; pass a positive multiple");
  }
  Handle taken;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    taken = take_aligned_extent(bytes);
  }
  take_large_pages(taken, bytes);
  if (Status s = take_memory(taken, bytes); !s.ok()) return s;
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < n; ++i) {
    handles[i] = taken + i * chunk_bytes;
    live_.emplace(handles[i], chunk_bytes);
  }
  return Status::Ok();
}

Status HostDriver::take_memory(Handle extent, size_t bytes) {
  const int error = fallocate_fully(fd_, 0, static_cast<off_t>(extent), static_cast<off_t>(bytes));
  if (error == 0) return Status::Ok();
  // It may have got a part, of pages that large ones were to be made from.
  (void)fallocate_fully(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(extent),
                        static_cast<off_t>(bytes));
  std::lock_guard<std::mutex> lock(mutex_);
  free_extent(extent, bytes);
  return system_error("cannot take " + human_bytes(bytes) + " of memory from the system", error,
                      "the machine is short of memory: lower the limit or free some");
}

void HostDriver::take_large_pages(Handle extent, size_t bytes) {
  // The system makes one of what is there of a large page, so something has to be; and it does so
  // where the file is mapped.
  for (Handle end = extent + large_bytes_; end <= extent + bytes; end += large_bytes_) {
    const auto last_page = static_cast<off_t>(end - page_bytes_);
    if (fallocate_fully(fd_, 0, last_page, static_cast<off_t>(page_bytes_)) != 0) return;
  }
  std::byte* base = nullptr;
  if (!reserve(bytes, large_bytes_, &base).ok()) return;
  void* got = mmap(base, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd_,
                   static_cast<off_t>(extent));
  // One call for all: each begins with waiting for every processor.
  if (got != MAP_FAILED) (void)madvise(base, bytes, kCollapse);
  munmap(base, bytes);
}

Status HostDriver::destroy(Handle handle, size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto it = live_.find(handle);
    if (it == live_.end() || it->second != bytes) {
      return Status(Code::kInvalid, "there is no memory with handle " + std::to_string(handle) +
                                        " and " + human_bytes(bytes) + " to destroy");
    }
    live_.erase(it);
  }
  const int error = fallocate_fully(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                    static_cast<off_t>(handle), static_cast<off_t>(bytes));
  std::lock_guard<std::mutex> lock(mutex_);
  if (error != 0) {
    live_.emplace(handle, bytes);
    return system_error("cannot give " + human_bytes(bytes) + " of memory back to the system",
                        error, "try again later");
  }
  free_extent(handle, bytes);
  return Status::Ok();
}

Status HostDriver::check_map(const Handle* handles, size_t n, size_t chunk_bytes) const {
  for (size_t i = 0; i < n; ++i) {
    const auto it = live_.find(handles[i]);
    if (it == live_.end() || it->second != chunk_bytes) {
      return Status(Code::kInvalid, "there is no memory with handle " + std::to_string(handles[i]) +
                                        " and " + human_bytes(chunk_bytes) + " to map");
    }
  }
  size_t runs = 0;
  for (size_t i = 0; i < n; i = run_end(handles, i, n, chunk_bytes)) ++runs;
  if (mappings_.kernel_mappings() + runs + 1 > max_mappings_) {
    return Status(Code::kDriver, "cannot map " + std::to_string(n) + " chunks of " +
                                     human_bytes(chunk_bytes) + ": " +
                                     std::to_string(mappings_.kernel_mappings()) + " of " +
                                     std::to_string(max_mappings_) +
                                     " memory mappings are in use; raise vm.max_map_count (sysctl) "
                                     "and start anew");
  }
  return Status::Ok();
}

Status HostDriver::map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) {
  if (Status s = check_size("map", chunk_bytes); !s.ok()) return s;
  {
    // Counted before it is done, so that threads cannot pass the limit together.
    std::lock_guard<std::mutex> lock(mutex_);
    if (Status s = check_map(handles, n, chunk_bytes); !s.ok()) return s;
    for (size_t i = 0; i < n; ++i) mappings_.add(at + i * chunk_bytes, chunk_bytes, handles[i]);
  }
  for (size_t first = 0, last; first < n; first = last) {
    last = run_end(handles, first, n, chunk_bytes);
    void* got =
        mmap(at + first * chunk_bytes, (last - first) * chunk_bytes, PROT_READ | PROT_WRITE,
             MAP_SHARED | MAP_FIXED | MAP_POPULATE, fd_, static_cast<off_t>(handles[first]));
    if (got != MAP_FAILED) continue;
    Status failure =
        system_error("cannot map " + std::to_string(n) + " chunks of " + human_bytes(chunk_bytes),
                     errno, "the process has run out of mappings: raise vm.max_map_count");
    if (first == 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      mappings_.remove(at, n * chunk_bytes);
      return failure;
    }
    if (Status undo = unmap(at, n * chunk_bytes); !undo.ok()) {
      return Status(Code::kBroken, failure.message() + "; then " + undo.message());
    }
    return failure;
  }
  return Status::Ok();
}

Status HostDriver::unmap(std::byte* at, size_t bytes) {
  if (Status s = check_size("unmap", bytes); !s.ok()) return s;
  // Not munmap: the addresses must not become anybody else's.
  void* got = mmap(at, bytes, PROT_NONE, kReservedFlags | MAP_FIXED, -1, 0);
  if (got == MAP_FAILED) {
    return system_error("cannot unmap " + human_bytes(bytes), errno,
                        "the process has run out of mappings: raise vm.max_map_count");
  }
  std::lock_guard<std::mutex> lock(mutex_);
  mappings_.remove(at, bytes);
  return Status::Ok();
}

}  // namespace ellm
