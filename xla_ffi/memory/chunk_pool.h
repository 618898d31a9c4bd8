// The one pool of physical memory: who owns how much of it, to the byte.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "memory/driver.h"
#include "memory/status.h"

namespace ellm {

enum class Owner : uint8_t { kKv, kCache, kActivation, kWeights, kWorkspace, kAvailable };
inline constexpr size_t kOwnerCount = 6;

const char* owner_name(Owner owner);
Result<Owner> owner_from_name(std::string_view name);

// Index and generation of a chunk. An id dies with the last reference to its chunk and is not used
// again, so that a stale one is refused instead of hitting somebody else's chunk.
using ChunkId = uint64_t;

// One consistent picture of the pool, in bytes.
// free + kv + cache + activation + weights + workspace == limit.
struct Usage {
  size_t limit;
  size_t free;  // Includes `available` and `backed_free`.
  size_t kv, cache, activation, weights, workspace;
  size_t available;    // Free, but still mapped in dead slots: unmap them to get at it.
  size_t backed_free;  // Free, with the physical memory kept for the next acquire.
  size_t obtainable;   // free - available: what a reservation gets now.
  size_t physical;     // What the pool accounts for as taken from the system; never above limit.
  // The highest values since the pool was made or reset_peaks() was called.
  size_t peak_kv, peak_cache, peak_activation, peak_weights, peak_workspace, peak_available;
  size_t peak_used;  // Of all owners together, without `available`.
  size_t peak_physical;
  // Driver calls since the pool was made, and the time in them.
  uint64_t create_calls, create_us, destroy_calls, destroy_us;
};

// Thread-safe. The lock is not held across driver calls: a decision is taken under it, carried out
// without it, then committed or rolled back. A call may wait for another thread that is giving
// memory back to the system, when it needs that very memory.
class ChunkPool {
 public:
  // `limit_bytes` need not be a multiple of `chunk_bytes`. Errors: kInvalid.
  static Result<std::shared_ptr<ChunkPool>> Create(std::shared_ptr<Driver> driver,
                                                   size_t chunk_bytes, size_t limit_bytes);
  // Gives free memory back. Chunks that still have an owner may still be mapped: they are left to
  // the driver's own destructor.
  ~ChunkPool();
  ChunkPool(const ChunkPool&) = delete;
  ChunkPool& operator=(const ChunkPool&) = delete;

  // Appends `n` chunks to `out`, each with one reference; all or nothing. `owner` is kKv, kCache or
  // kWorkspace. Errors: kOutOfMemory, kDriver, kInvalid; the ledger is then as before.
  Status acquire(Owner owner, size_t n, std::vector<ChunkId>* out);
  Status retain(ChunkId id);
  // Drops a reference. With the last one the chunk becomes free and stays backed.
  // The caller has unmapped it.
  Status release(ChunkId id);
  // Moves a chunk to another chunk owner (kKv, kCache, kWorkspace, kAvailable).
  Status reassign(ChunkId id, Owner owner);
  Result<Handle> handle(ChunkId id) const;
  Result<uint32_t> references(ChunkId id) const;

  // Counts bytes that somebody else allocates (weights, activations). Backed free chunks are handed
  // back to the system first where the sum would pass the limit. Any owner but kAvailable.
  // Errors: kOutOfMemory, kDriver, kInvalid; the ledger is then as before.
  Status reserve_bytes(Owner owner, size_t bytes);
  // Errors: kInvalid if `owner` holds fewer plain bytes.
  Status return_bytes(Owner owner, size_t bytes);

  // Hands backed free chunks back to the system until at most `keep_backed_bytes` are left.
  // Returns the bytes handed back. Errors: kDriver; chunks that did not go stay backed.
  Result<size_t> trim(size_t keep_backed_bytes);
  // Errors: kOutOfMemory below what is owned or available, kDriver, kInvalid; the old limit stays.
  Status set_limit(size_t limit_bytes);

  Usage usage() const;
  void reset_peaks();

  size_t chunk_bytes() const { return chunk_bytes_; }
  Driver& driver() const { return *driver_; }

 private:
  // Vacant: no handle. Backed and free: a handle, no references. Owned: both.
  struct Chunk {
    Handle handle = 0;
    uint32_t references = 0;
    uint32_t generation = 0;
    Owner owner = Owner::kKv;
  };

  ChunkPool(std::shared_ptr<Driver> driver, size_t chunk_bytes, size_t limit_bytes);

  // The functions below are called with the lock held.
  const Chunk* find(ChunkId id) const;
  Chunk* find(ChunkId id);
  ChunkId own(uint32_t index, Owner owner);
  uint32_t add_chunk(Handle handle);
  std::vector<Handle> take_backed_for_destruction(size_t n);
  size_t claimed() const;   // All owners and kAvailable.
  size_t physical() const;  // claimed, backed free chunks, and what is being destroyed.
  void add(Owner owner, size_t bytes);
  void subtract(Owner owner, size_t bytes);
  void note_physical();
  Status out_of_memory(const std::string& asked) const;

  // The functions below are called without the lock.
  Status create_handles(size_t n, std::vector<Handle>* out);
  // Destroys handles that are counted in destroying_bytes_. Goes on after a failure, keeps what did
  // not go as backed free chunks, and reports the first error.
  Status destroy_handles(const std::vector<Handle>& handles, size_t* destroyed);

  const std::shared_ptr<Driver> driver_;
  const size_t chunk_bytes_;

  mutable std::mutex mutex_;
  std::condition_variable destroyed_;  // destroying_bytes_ has fallen.
  size_t limit_;
  std::array<size_t, kOwnerCount> owned_{};  // Chunks and plain bytes.
  std::array<size_t, kOwnerCount> plain_{};  // The plain bytes among them.
  std::array<size_t, kOwnerCount> peak_{};
  size_t peak_used_ = 0;
  size_t peak_physical_ = 0;
  size_t destroying_bytes_ = 0;
  std::vector<Chunk> chunks_;
  std::vector<uint32_t> vacant_;
  // Backed free chunks by handle: the lowest are handed out first, the highest destroyed first, so
  // that chunks given out together tend to be neighbours.
  std::map<Handle, uint32_t> backed_;
  uint64_t create_calls_ = 0, create_ns_ = 0, destroy_calls_ = 0, destroy_ns_ = 0;
};

}  // namespace ellm
