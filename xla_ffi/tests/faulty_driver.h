// A driver that fails on command and keeps the books on the one below it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "faults.h"
#include "memory/driver.h"

namespace ellm {

// Counts every call from 1 and lets a chosen run of them fail: map and unmap may be half done, and
// map then says kBroken. Or, given a plan of somebody below the driver, lets calls there fail
// instead, and counts those. Its shadow of ranges, handles and
// mappings notices broken rules, which a real driver may let pass, and what is left at the end.
// Thread-safe; its lock is not held across calls of the driver below.
class FaultyDriver : public Driver {
 public:
  using Fault = ellm::Fault;

  explicit FaultyDriver(std::shared_ptr<Driver> driver, FaultPlan* below = nullptr)
      : driver_(std::move(driver)),
        plan_(below != nullptr ? *below : own_plan_),
        first_call_(plan_.calls()),
        first_fault_(plan_.faults()) {
    plan_.fail(0, 0, Fault::kClean);
  }
  // The driver below may end in peace.
  ~FaultyDriver() override { plan_.fail(0, 0, Fault::kClean); }

  // Calls `first` to `first + count - 1` fail.
  void fail(uint64_t first, uint64_t count = 1, Fault fault = Fault::kClean) {
    plan_.fail(first_call_ + first, count, fault);
  }
  uint64_t calls() const { return plan_.calls() - first_call_; }
  uint64_t faults() const { return plan_.faults() - first_fault_; }

  // Rules that a caller has broken, one per line; empty if none.
  std::string violations() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return violations_;
  }
  // Ranges, handles and mappings that exist now; empty if none.
  std::string leftovers() const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (ranges_.empty() && handles_.empty() && pieces_.empty()) return "";
    return std::to_string(ranges_.size()) + " ranges, " + std::to_string(handles_.size()) +
           " handles, " + std::to_string(pieces_.size()) + " mappings";
  }
  size_t handle_count() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return handles_.size();
  }

  size_t granularity_bytes() const override { return driver_->granularity_bytes(); }
  Reach reach() const override { return driver_->reach(); }
  int ordinal() const override { return driver_->ordinal(); }
  size_t large_bytes() const override { return driver_->large_bytes(); }
  Status synchronize() override { return driver_->synchronize(); }

  Status reserve(size_t bytes, size_t alignment, std::byte** base) override {
    if (fails()) return failed("reserve");
    Status s = driver_->reserve(bytes, alignment, base);
    std::lock_guard<std::mutex> lock(mutex_);
    if (s.ok()) ranges_[*base] = bytes;
    return s;
  }

  Status release(std::byte* base, size_t bytes) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto range = ranges_.find(base);
      expect(range != ranges_.end() && range->second == bytes, "release of no range");
      const auto piece = pieces_.lower_bound(base);
      expect(piece == pieces_.end() || piece->first >= base + bytes, "release of a mapped range");
    }
    if (fails()) return failed("release");
    Status s = driver_->release(base, bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    if (s.ok()) ranges_.erase(base);
    return s;
  }

  Status create(size_t bytes, Handle* handle) override {
    if (fails()) return failed("create");
    Status s = driver_->create(bytes, handle);
    std::lock_guard<std::mutex> lock(mutex_);
    if (s.ok()) expect(handles_.emplace(*handle, bytes).second, "create of a handle that exists");
    return s;
  }

  Status create_large(size_t chunk_bytes, size_t n, Handle* handles) override {
    if (fails()) return failed("create_large");
    Status s = driver_->create_large(chunk_bytes, n, handles);
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < n && s.ok(); ++i) {
      expect(handles_.emplace(handles[i], chunk_bytes).second, "create of a handle that exists");
    }
    return s;
  }

  Status destroy(Handle handle, size_t bytes) override {
    if (fails()) return failed("destroy");
    {
      std::lock_guard<std::mutex> lock(mutex_);
      for (const auto& [at, piece] : pieces_) {
        expect(piece.handle != handle, "destroy of a handle that may be mapped");
      }
      expect(handles_.erase(handle) == 1, "destroy of no handle");
    }
    Status s = driver_->destroy(handle, bytes);
    std::lock_guard<std::mutex> lock(mutex_);
    if (!s.ok()) handles_.emplace(handle, bytes);
    return s;
  }

  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      expect(inside_a_range(at, n * chunk_bytes), "map outside of every range");
      const auto next = pieces_.lower_bound(at);
      expect(next == pieces_.end() || next->first >= at + n * chunk_bytes, "map over a mapping");
      for (size_t i = 0; i < n; ++i) expect(handles_.count(handles[i]) == 1, "map of no handle");
    }
    Status s = Status::Ok();
    if (fails()) {
      s = failed("map");
      if (half_done()) {
        (void)driver_->map(at, handles, (n + 1) / 2, chunk_bytes);
        s = Status(Code::kBroken, "map failed on command, half-way");
      }
    } else {
      s = driver_->map(at, handles, n, chunk_bytes);
    }
    if (!s.ok() && s.code() != Code::kBroken) return s;
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < n; ++i) {
      pieces_[at + i * chunk_bytes] = {handles[i], chunk_bytes, !s.ok()};
    }
    return s;
  }

  Status unmap(std::byte* at, size_t bytes) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      size_t certain = 0, uncertain = 0;
      for (auto it = pieces_.lower_bound(at); it != pieces_.end() && it->first < at + bytes; ++it) {
        (it->second.uncertain ? uncertain : certain) += it->second.bytes;
      }
      expect(certain + uncertain == bytes, "unmap of what is not mapped");
    }
    const bool fail = fails();
    if (!fail || half_done()) {
      const size_t part = fail ? bytes / 2 / granularity_bytes() * granularity_bytes() : bytes;
      if (part > 0) {
        if (Status s = driver_->unmap(at, part); !s.ok()) return s;
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    const auto first = pieces_.lower_bound(at);
    const auto last = pieces_.lower_bound(at + bytes);
    if (!fail) {
      pieces_.erase(first, last);
      return Status::Ok();
    }
    for (auto it = first; it != last; ++it) it->second.uncertain = true;
    return failed("unmap");
  }

 private:
  struct Piece {
    Handle handle;
    size_t bytes;
    bool uncertain;
  };

  static Status failed(const char* call) {
    return Status(Code::kDriver, std::string(call) + " failed on command");
  }

  bool fails() { return &plan_ == &own_plan_ && own_plan_.next(); }
  bool half_done() const { return plan_.half_done(); }
  // With the lock held.
  void expect(bool condition, const char* rule) {
    if (!condition) violations_ += std::string(rule) + "\n";
  }
  bool inside_a_range(std::byte* at, size_t bytes) const {
    const auto after = ranges_.upper_bound(at);
    if (after == ranges_.begin()) return false;
    const auto range = std::prev(after);
    return at + bytes <= range->first + range->second;
  }

  const std::shared_ptr<Driver> driver_;
  FaultPlan own_plan_;
  FaultPlan& plan_;
  const uint64_t first_call_, first_fault_;
  mutable std::mutex mutex_;
  std::map<std::byte*, size_t> ranges_;
  std::map<Handle, size_t> handles_;
  std::map<std::byte*, Piece> pieces_;
  std::string violations_;
};

}  // namespace ellm
