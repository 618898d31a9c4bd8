// How many mappings the kernel keeps for chunks that are mapped here and there.
#pragma once

#include <cstddef>
#include <iterator>
#include <map>

#include "memory/driver.h"

namespace ellm {

// Knows the runs of neighbouring file offsets at neighbouring addresses, each of which is one
// kernel mapping, and so is each gap between them. Not thread-safe.
class MappingTable {
 public:
  // [at, at + bytes) shows the file from `offset`; nothing was mapped there.
  void add(std::byte* at, size_t bytes, Handle offset) {
    const auto next = runs_.lower_bound(at);
    auto run = runs_.emplace_hint(next, at, Run{at + bytes, offset});
    join_or_merge(run);
    if (run != runs_.begin()) join_or_merge(std::prev(run));
  }

  // Nothing is mapped in [at, at + bytes) any more.
  void remove(std::byte* at, size_t bytes) {
    split(at);
    split(at + bytes);
    auto run = runs_.lower_bound(at);
    while (run != runs_.end() && run->first < at + bytes) {
      if (run != runs_.begin()) joints_ -= touches_next(std::prev(run));
      joints_ -= touches_next(run);
      run = runs_.erase(run);
    }
  }

  size_t runs() const { return runs_.size(); }
  // Runs and the gaps round them: a gap follows each run that does not touch the next.
  size_t kernel_mappings() const { return 2 * runs_.size() - joints_; }

 private:
  struct Run {
    std::byte* end;
    Handle offset;
  };
  using Iterator = std::map<std::byte*, Run>::iterator;

  bool touches_next(Iterator run) const {
    const auto next = std::next(run);
    return next != runs_.end() && run->second.end == next->first;
  }

  void join_or_merge(Iterator run) {
    if (!touches_next(run)) return;
    const auto next = std::next(run);
    const auto run_bytes = static_cast<Handle>(run->second.end - run->first);
    if (run->second.offset + run_bytes == next->second.offset) {
      run->second.end = next->second.end;
      runs_.erase(next);
    } else {
      ++joints_;
    }
  }

  void split(std::byte* at) {
    auto run = runs_.lower_bound(at);
    if (run == runs_.begin()) return;
    --run;
    if (run->second.end <= at) return;
    const auto before = static_cast<Handle>(at - run->first);
    runs_.emplace(at, Run{run->second.end, run->second.offset + before});
    run->second.end = at;
    ++joints_;
  }

  std::map<std::byte*, Run> runs_;
  size_t joints_ = 0;  // Pairs of runs that touch.
};

}  // namespace ellm
