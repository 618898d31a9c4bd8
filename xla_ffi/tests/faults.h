// How tests choose the calls that fail.
#pragma once

#include <cstdint>
#include <mutex>

namespace ellm {

enum class Fault {
  kClean,     // The call does nothing.
  kHalfDone,  // Calls that work on several things do a part of them; others do nothing.
};

// Counts calls from 1 and lets a chosen run of them fail. Thread-safe.
class FaultPlan {
 public:
  // Calls `first` to `first + count - 1` fail.
  void fail(uint64_t first, uint64_t count, Fault fault) {
    std::lock_guard<std::mutex> lock(mutex_);
    first_ = first;
    count_ = count;
    fault_ = fault;
  }
  // One more call; whether it fails.
  bool next() {
    std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t call = ++calls_;
    const bool fails = call >= first_ && call - first_ < count_;
    if (fails) ++faults_;
    return fails;
  }
  bool half_done() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return fault_ == Fault::kHalfDone;
  }
  uint64_t calls() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return calls_;
  }
  uint64_t faults() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return faults_;
  }

 private:
  mutable std::mutex mutex_;
  uint64_t first_ = 0, count_ = 0;
  Fault fault_ = Fault::kClean;
  uint64_t calls_ = 0, faults_ = 0;
};

}  // namespace ellm
