// Memory for activations of the library's own: virtual tensors in one reserved range, managed best
// fit with coalescing (BFC), mapped when first used and kept mapped for the next.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "memory/chunk_pool.h"
#include "memory/status.h"

namespace ellm {

// One consistent picture, in bytes.
struct ArenaUsage {
  size_t live;      // Mapped in segments that are allocated.
  size_t inactive;  // The rest of `mapped`: kept for the next allocation, until collect().
  size_t mapped;    // All chunks that the arena holds; the pool counts them as activation.
  size_t reserved;  // Addresses.
};

// Thread-safe; a call may wait for another one's driver calls. Segments are whole chunks, so none
// shares a chunk with another. The state of the chunk positions of a free segment may differ.
class Arena {
 public:
  // `reserved_bytes` is rounded up to chunks. Errors: kInvalid, kDriver (no addresses).
  static Result<std::shared_ptr<Arena>> Create(std::shared_ptr<ChunkPool> pool,
                                               size_t reserved_bytes);
  // Unmaps everything. What cannot be unmapped even now is leaked: addresses and chunks.
  ~Arena();
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  // A segment of `bytes`, at the start of a chunk, contents undefined. Of the free segments that
  // fit, the one in which fewest chunks have to be mapped, then the smallest, then the lowest.
  // Where the pool is short, inactive chunks elsewhere in the arena are unmapped first.
  // Errors: kOutOfMemory (addresses or chunks), kDriver, kBroken, kInvalid (0 bytes): no segment is
  // made then, but inactive chunks may have been mapped, or given back.
  Result<std::byte*> allocate(size_t bytes);
  // Its chunks stay mapped and become inactive. Errors: kInvalid unless `at` is from allocate().
  Status free(std::byte* at);
  // Unmaps inactive chunks, the highest first, until `bytes` are back in the pool or none is left.
  // Returns the bytes given back, which may be fewer. Errors: kBroken; it goes on after an error,
  // and chunks that may still be mapped stay the arena's, to be tried again.
  Result<size_t> collect(size_t bytes);

  ArenaUsage usage() const;
  const std::shared_ptr<ChunkPool>& pool() const { return pool_; }

 private:
  struct Position {
    ChunkId chunk = 0;  // 0: none is mapped here; no id is 0.
    bool sound = true;  // False: the chunk may or may not be mapped.
  };
  using Segments = std::map<size_t, size_t>;  // Chunks by first position.

  Arena(std::shared_ptr<ChunkPool> pool, std::byte* base, size_t chunks)
      : pool_(std::move(pool)), base_(base), positions_(chunks) {
    free_.emplace(0, chunks);
  }

  // With the lock held.
  bool usable(size_t position) const {
    return positions_[position].chunk != 0 && positions_[position].sound;
  }
  size_t missing(size_t begin, size_t n) const;
  Segments::iterator best_fit(size_t n);
  Status map_missing(size_t begin, size_t n);
  Status unmap(size_t begin, size_t n);
  Status collect_chunks(size_t n, size_t keep_begin, size_t keep_end, size_t* given);
  std::byte* address(size_t position) const { return base_ + position * pool_->chunk_bytes(); }

  const std::shared_ptr<ChunkPool> pool_;
  std::byte* const base_;
  mutable std::mutex mutex_;
  std::vector<Position> positions_;
  Segments free_;  // None touches another.
  Segments live_;
};

}  // namespace ellm
