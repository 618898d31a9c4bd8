// The chunks of a pool that have memory and no owner.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <vector>

#include "memory/driver.h"

namespace ellm {

// Those that together are a large page stay together for as long as others are left: one chunk
// taken from among them, and the rest can no longer be mapped as one. Not thread-safe.
class BackedChunks {
 public:
  struct Backed {
    Handle handle;
    uint32_t index;  // In the pool.
  };

  // `group` chunks of `chunk_bytes`, neighbours from a multiple of their size on, are a large page;
  // 1: chunks are on their own.
  BackedChunks(size_t chunk_bytes, size_t group) : chunk_bytes_(chunk_bytes), group_(group) {}

  size_t size() const { return loose_.size() + group_ * groups_.size(); }
  bool empty() const { return loose_.empty() && groups_.empty(); }

  void add(Handle handle, uint32_t index) {
    loose_.emplace(handle, index);
    if (group_ > 1) join(handle / (group_ * chunk_bytes_) * (group_ * chunk_bytes_));
  }

  // The lowest of those that are in no group, if there are any: so that chunks given out one after
  // the other tend to be neighbours. There is one.
  uint32_t take() {
    if (loose_.empty()) break_up(groups_.begin());
    const uint32_t index = loose_.begin()->second;
    loose_.erase(loose_.begin());
    return index;
  }

  // The lowest group, to indices[0] and on in order of their handles; false where there is none.
  bool take_group(uint32_t* indices) {
    if (groups_.empty()) return false;
    for (const uint32_t index : groups_.begin()->second) *indices++ = index;
    groups_.erase(groups_.begin());
    return true;
  }

  // For whoever gives memory back: the highest that is in no group, else of the highest group.
  // There is one.
  Backed take_last() {
    if (loose_.empty()) break_up(std::prev(groups_.end()));
    const auto last = std::prev(loose_.end());
    const Backed backed{last->first, last->second};
    loose_.erase(last);
    return backed;
  }

 private:
  using Groups = std::map<Handle, std::vector<uint32_t>>;  // By the lowest handle.

  void break_up(Groups::iterator group) {
    Handle handle = group->first;
    for (const uint32_t index : group->second) {
      loose_.emplace(handle, index);
      handle += chunk_bytes_;
    }
    groups_.erase(group);
  }

  // Makes a group of those from `first` on if they are all there.
  void join(Handle first) {
    const auto begin = loose_.find(first);
    auto end = begin;
    for (size_t i = 0; i < group_; ++i, ++end) {
      if (end == loose_.end() || end->first != first + i * chunk_bytes_) return;
    }
    std::vector<uint32_t>& group = groups_[first];
    for (auto it = begin; it != end; ++it) group.push_back(it->second);
    loose_.erase(begin, end);
  }

  size_t chunk_bytes_;
  size_t group_;
  std::map<Handle, uint32_t> loose_;
  Groups groups_;
};

}  // namespace ellm
