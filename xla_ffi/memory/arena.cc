#include "memory/arena.h"

#include <algorithm>
#include <iterator>
#include <string>
#include <utility>

#include "memory/text.h"

namespace ellm {

Result<std::shared_ptr<Arena>> Arena::Create(std::shared_ptr<ChunkPool> pool,
                                             size_t reserved_bytes) {
  const size_t chunk_bytes = pool->chunk_bytes();
  if (reserved_bytes == 0 || reserved_bytes > SIZE_MAX - chunk_bytes) {
    return Status(Code::kInvalid, "reserved_bytes is " + std::to_string(reserved_bytes) +
                                      "; pass the addresses that all workspaces together may take");
  }
  const size_t chunks = (reserved_bytes + chunk_bytes - 1) / chunk_bytes;
  std::byte* base = nullptr;
  if (Status s = pool->driver().reserve(chunks * chunk_bytes, chunk_bytes, &base); !s.ok()) {
    return s;
  }
  return std::shared_ptr<Arena>(new Arena(std::move(pool), base, chunks));
}

Arena::~Arena() {
  const size_t chunks = positions_.size();
  for (size_t i = 0; i < chunks; ++i) {
    if (positions_[i].chunk != 0) (void)unmap(i, 1);
  }
  for (const Position& position : positions_) {
    if (position.chunk != 0) return;
  }
  (void)pool_->driver().release(base_, chunks * pool_->chunk_bytes());
}

size_t Arena::missing(size_t begin, size_t n) const {
  size_t missing = 0;
  for (size_t i = begin; i < begin + n; ++i) missing += !usable(i);
  return missing;
}

Arena::Segments::iterator Arena::best_fit(size_t n) {
  auto best = free_.end();
  std::pair<size_t, size_t> best_cost;
  for (auto it = free_.begin(); it != free_.end(); ++it) {
    if (it->second < n) continue;
    const std::pair<size_t, size_t> cost(missing(it->first, n), it->second);
    if (best != free_.end() && cost >= best_cost) continue;
    best = it;
    best_cost = cost;
  }
  return best;
}

// Unmaps [begin, begin + n), where each position has a chunk, and gives the chunks up.
Status Arena::unmap(size_t begin, size_t n) {
  Status s = pool_->driver().unmap(address(begin), n * pool_->chunk_bytes());
  if (!s.ok()) {
    for (size_t i = begin; i < begin + n; ++i) positions_[i].sound = false;
    return Status(Code::kBroken, s.message());
  }
  for (size_t i = begin; i < begin + n; ++i) {
    (void)pool_->release(positions_[i].chunk);  // Cannot fail: the arena holds the reference.
    positions_[i] = Position{};
  }
  return Status::Ok();
}

// Maps until all of [begin, begin + n) is usable. What was mapped before a failure stays.
Status Arena::map_missing(size_t begin, size_t n) {
  const size_t end = begin + n;
  for (size_t i = begin; i < end; ++i) {
    if (positions_[i].sound) continue;
    if (Status s = unmap(i, 1); !s.ok()) return s;
  }
  std::vector<ChunkId> ids;
  if (Status s = pool_->acquire(Owner::kActivation, missing(begin, n), &ids); !s.ok()) return s;
  std::vector<Handle> handles;
  for (const ChunkId id : ids) handles.push_back(pool_->handle(id).value());

  size_t used = 0;
  Status failure = Status::Ok();
  for (size_t first = begin, last; failure.ok() && first < end; first = last) {
    last = first + 1;
    if (positions_[first].chunk != 0) continue;
    while (last < end && positions_[last].chunk == 0) ++last;
    failure = pool_->driver().map(address(first), handles.data() + used, last - first,
                                  pool_->chunk_bytes());
    if (!failure.ok() && failure.code() != Code::kBroken) break;
    for (size_t i = first; i < last; ++i) positions_[i] = {ids[used++], failure.ok()};
  }
  for (; used < ids.size(); ++used) (void)pool_->release(ids[used]);
  return failure;
}

Result<std::byte*> Arena::allocate(size_t bytes) {
  if (bytes == 0) {
    return Status(Code::kInvalid, "a segment of 0 bytes was asked for; ask for at least 1");
  }
  const size_t chunk_bytes = pool_->chunk_bytes();
  const size_t n = bytes / chunk_bytes + (bytes % chunk_bytes != 0);
  std::lock_guard<std::mutex> lock(mutex_);
  for (;;) {
    const auto found = best_fit(n);
    if (found == free_.end()) {
      return Status(Code::kOutOfMemory, "no free segment of the arena's " +
                                            human_bytes(positions_.size() * chunk_bytes) +
                                            " of addresses holds the " + human_bytes(bytes) +
                                            " asked for; free a segment or reserve more");
    }
    const auto [begin, size] = *found;
    Status s = map_missing(begin, n);
    if (s.ok()) {
      free_.erase(found);
      if (size > n) free_.emplace(begin + n, size - n);
      live_.emplace(begin, n);
      return address(begin);
    }
    if (s.code() != Code::kOutOfMemory) return s;
    // What is inactive elsewhere may do; then look again what fits best.
    const size_t lacking = missing(begin, n);
    const size_t to_be_had = pool_->usage().obtainable / chunk_bytes;
    size_t given = 0;
    (void)collect_chunks(std::max<size_t>(1, lacking - std::min(lacking, to_be_had)), begin,
                         begin + n, &given);  // The shortage is the error to report.
    if (given == 0) return s;
  }
}

Status Arena::free(std::byte* at) {
  std::lock_guard<std::mutex> lock(mutex_);
  const size_t offset = at >= base_ ? static_cast<size_t>(at - base_) : SIZE_MAX;
  const auto found = live_.find(offset / pool_->chunk_bytes());
  if (found == live_.end() || offset % pool_->chunk_bytes() != 0) {
    return Status(Code::kInvalid, "no segment of the arena starts at the address " +
                                      std::to_string(reinterpret_cast<uintptr_t>(at)) +
                                      "; free each segment once, by what allocate returned");
  }
  auto [begin, n] = *found;
  live_.erase(found);
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == begin + n) {
    n += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto before = std::prev(next);
    if (before->first + before->second == begin) {
      before->second += n;
      return Status::Ok();
    }
  }
  free_.emplace(begin, n);
  return Status::Ok();
}

// Spares [keep_begin, keep_end), which is in one free segment.
Status Arena::collect_chunks(size_t n, size_t keep_begin, size_t keep_end, size_t* given) {
  const auto collectable = [&](size_t i) {
    return positions_[i].chunk != 0 && (i < keep_begin || i >= keep_end);
  };
  Status first = Status::Ok();
  for (auto segment = free_.rbegin(); segment != free_.rend(); ++segment) {
    size_t end = segment->first + segment->second;
    while (end > segment->first && *given < n) {
      if (!collectable(end - 1)) {
        --end;
        continue;
      }
      size_t begin = end - 1;
      while (begin > segment->first && collectable(begin - 1) && end - begin < n - *given) --begin;
      Status s = unmap(begin, end - begin);
      if (s.ok()) {
        *given += end - begin;
      } else if (first.ok()) {
        first = std::move(s);
      }
      end = begin;
    }
  }
  return first;
}

Result<size_t> Arena::collect(size_t bytes) {
  const size_t chunk_bytes = pool_->chunk_bytes();
  std::lock_guard<std::mutex> lock(mutex_);
  size_t given = 0;
  Status s = collect_chunks(bytes / chunk_bytes + (bytes % chunk_bytes != 0), 0, 0, &given);
  if (!s.ok()) return s;
  return given * chunk_bytes;
}

ArenaUsage Arena::usage() const {
  const size_t chunk_bytes = pool_->chunk_bytes();
  std::lock_guard<std::mutex> lock(mutex_);
  size_t live = 0, mapped = 0;
  for (const auto& [begin, n] : live_) live += n;
  for (const Position& position : positions_) mapped += position.chunk != 0;
  return {live * chunk_bytes, (mapped - live) * chunk_bytes, mapped * chunk_bytes,
          positions_.size() * chunk_bytes};
}

}  // namespace ellm
