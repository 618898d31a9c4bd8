// The one pool of physical memory: who owns how much of it, to the byte.
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "memory/backed_chunks.h"
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

// Whoever holds a chunk and works with it has a live reference; whoever only has it mapped still,
// an idle one. The prefix cache has one of its own kind. The owner of a chunk follows from them:
// the owner it was acquired for while there is a live one, else kCache while it is cached, else
// kAvailable.
enum class Reference : uint8_t { kLive, kIdle };

// Where chunks are going to be mapped, `chunks` of them side by side: who says so gets them in
// large pages where they fill such.
struct Destination {
  const std::byte* at = nullptr;
  size_t chunks = 0;
};

// Chunks that are counted, but whose memory may still have to be made; see ChunkPool::claim_up_to.
struct Claim {
  static constexpr uint32_t kUnmade = UINT32_MAX;

  Owner owner = Owner::kKv;
  std::vector<uint32_t> chunks;  // In the pool, or kUnmade.
  std::vector<size_t> large;     // Where in `chunks` those begin that would fill a large page.
};

// What retire() found, in chunks.
struct Retired {
  size_t leading;    // At the front: nobody else has a reference to them.
  size_t exclusive;  // In all.
};

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

  // Appends `n` chunks to `out`, each with one live reference; all or nothing. `owner` is kKv,
  // kCache, kActivation or kWorkspace. They come in the order of `where`, which is for `n` chunks
  // or empty. Errors: kOutOfMemory, kDriver, kInvalid; the ledger is then as before.
  Status acquire(Owner owner, size_t n, std::vector<ChunkId>* out,
                 const std::vector<Destination>& where = {});
  // The halves of acquire. The first counts up to as many chunks as the destination has as the
  // owner's, as many as can be had at once: it neither waits nor calls the driver. The second gets
  // the memory that they lack; it is owed for every claim. Errors of fill: kDriver; the claim is
  // then undone.
  Claim claim_up_to(Owner owner, Destination where);
  Status fill(Claim claim, std::vector<ChunkId>* out);

  // One more live reference to each chunk; all or nothing. Errors: kInvalid, also for chunks with
  // idle references only: whoever maps those is about to let go.
  Status retain(const std::vector<ChunkId>& ids);
  Status retain(ChunkId id) { return retain(std::vector<ChunkId>{id}); }
  // Drops a reference to each, going on after an error. With the last one a chunk becomes free and
  // stays backed. The caller has unmapped it. Errors: kInvalid.
  Status release(const std::vector<ChunkId>& ids, Reference kind = Reference::kLive);
  Status release(ChunkId id) { return release(std::vector<ChunkId>{id}); }
  // A live reference to each becomes an idle one, and the reverse. The caller holds them.
  Retired retire(const std::vector<ChunkId>& ids);
  void revive(const std::vector<ChunkId>& ids);
  // The prefix cache takes its one reference to each chunk; all or nothing. Errors: kInvalid, for
  // chunks that are nobody's live KV or are cached already.
  Status cache(const std::vector<ChunkId>& ids);
  // It gives them up; all or nothing. Returns the bytes that became free or available. Errors:
  // kInvalid.
  Result<size_t> uncache(const std::vector<ChunkId>& ids);
  Result<Handle> handle(ChunkId id) const;

  // From now on up to `bytes` of free memory are backed ahead, by a thread of the pool's own, so
  // that acquire finds memory made. What is made ahead counts as backed free from before the driver
  // is asked, so that the limit holds. The thread starts at once and whenever chunks were taken; it
  // rests when that much is backed, nothing more fits, the system refused, or backed memory was
  // handed back for some reason. 0 ends it.
  void back_ahead(size_t bytes);

  // Memory is about to come back: until the matching return_settled(), whoever is short waits
  // before it is refused. The caller needs nothing of this pool to get that far.
  void expect_return();
  void return_settled();

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
    uint32_t live = 0;
    uint32_t idle = 0;
    uint32_t generation = 0;
    bool cached = false;
    Owner acquired_for = Owner::kKv;
    Owner owner = Owner::kKv;

    bool held() const { return live > 0 || idle > 0 || cached; }
  };

  ChunkPool(std::shared_ptr<Driver> driver, size_t chunk_bytes, size_t limit_bytes);

  // The functions below are called with the lock held.
  const Chunk* find(ChunkId id) const;
  Chunk* find(ChunkId id);
  ChunkId own(uint32_t index, Owner owner);
  // Makes the owner follow the references, which have changed.
  void update_owner(ChunkId id);
  // Counts `n` chunks, which are free, for a claim.
  Claim take(Owner owner, size_t n, const std::vector<Destination>& where);
  uint32_t add_chunk(Handle handle);
  std::vector<Handle> take_backed_for_destruction(size_t n);
  size_t claimed() const;   // All owners and kAvailable.
  size_t physical() const;  // claimed, backed free chunks, what is being destroyed or made ahead.
  void add(Owner owner, size_t bytes);
  void subtract(Owner owner, size_t bytes);
  void note_physical();
  Status out_of_memory(const std::string& asked) const;

  bool may_back_one() const;

  // The functions below are called without the lock.
  void back_on_demand();  // The thread.
  // `n` handles, in large pages if they are neighbours and fill such. Appends what it got before it
  // failed.
  Status create_handles(size_t n, bool large, std::vector<Handle>* out);
  // Destroys handles that are counted in destroying_bytes_. Goes on after a failure, keeps what did
  // not go as backed free chunks, and reports the first error.
  Status destroy_handles(const std::vector<Handle>& handles, size_t* destroyed);

  const std::shared_ptr<Driver> driver_;
  const size_t chunk_bytes_;
  const size_t large_chunks_;  // That fill a large page, or are one and more; 0: there are none.

  mutable std::mutex mutex_;
  // destroying_bytes_, making_bytes_ or expected_returns_ has fallen.
  std::condition_variable changed_;
  size_t limit_;
  std::array<size_t, kOwnerCount> owned_{};  // Chunks and plain bytes.
  std::array<size_t, kOwnerCount> plain_{};  // The plain bytes among them.
  std::array<size_t, kOwnerCount> peak_{};
  size_t peak_used_ = 0;
  size_t peak_physical_ = 0;
  size_t destroying_bytes_ = 0;
  size_t making_bytes_ = 0;  // What back_on_demand() is about to add to backed_.
  size_t expected_returns_ = 0;
  size_t chunks_ahead_ = 0;  // To be backed ahead.
  bool backing_ = false;     // Until that is so, or cannot be.
  bool stopping_ = false;
  std::condition_variable backing_wanted_;
  std::vector<Chunk> chunks_;
  std::vector<uint32_t> vacant_;
  BackedChunks backed_;
  uint64_t create_calls_ = 0, create_ns_ = 0, destroy_calls_ = 0, destroy_ns_ = 0;
  std::mutex backer_mutex_;  // Guards the thread's start and end.
  std::thread backer_;       // Last: it uses what stands above.
};

}  // namespace ellm
