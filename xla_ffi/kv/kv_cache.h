// The slots of a model: one virtual tensor per request over the shared pool.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "kv/layout.h"
#include "kv/slot_worker.h"
#include "memory/chunk_pool.h"
#include "memory/status.h"
#include "memory/virtual_tensor.h"

namespace ellm {

enum class SlotState : uint8_t {
  kFree,       // Nothing mapped, nobody's.
  kActive,     // A request's.
  kAvailable,  // Nobody's, still mapped for the next request.
  kDying,      // Nobody's, and a part of it is being unmapped by the cache's thread.
  kBroken,     // An unmap failed; see KvCache::release and KvCache::reclaim.
};
const char* slot_state_name(SlotState state);

struct KvStats {
  size_t active_bytes, available_bytes, broken_bytes;  // Mapped, by state of the slot.
  size_t dying_bytes;  // Mapped in dying slots and held by nobody else: free before long.
  int64_t active_slots, available_slots, free_slots, dying_slots, broken_slots;
  uint64_t map_calls, map_us, unmap_calls, unmap_us;
};

// The calls that change something belong to one host thread at a time; a second thread that enters
// meanwhile is refused with kInvalid. The const calls are lock-free, from any thread, at any time.
// Memory that a kernel in flight may touch must not be unmapped: no truncate, release or close of
// it.
//
// The cache has a thread of its own, started when premap() or release_async() first need it. A slot
// with work pending there belongs to that thread; calls that need the slot wait for it alone, or do
// the work themselves where it has not begun.
class KvCache {
 public:
  // Reserves the addresses of every slot; maps nothing. Errors: kInvalid (layout, or a pool with
  // other chunks), kDriver (no addresses).
  static Result<std::shared_ptr<KvCache>> Create(std::shared_ptr<ChunkPool> pool,
                                                 const KvLayout& layout);
  // As close(). What cannot be unmapped even now, or may still be touched, is leaked: addresses and
  // chunks.
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // A slot for a request of about `tokens` tokens: the smallest available slot in which that much
  // is mapped, else one with nothing mapped, else the largest available one. It keeps what is
  // mapped in it, and nothing is mapped here. Errors: kOutOfMemory (no slot left), kInvalid.
  Result<int32_t> take_slot(int64_t tokens);

  // That very slot, with what is mapped in it, after what is pending there: for several caches that
  // are to give a request the same slot. Errors: kOutOfMemory (it is in use), kBroken (it is broken
  // and could not be repaired now), kInvalid (there is no such slot).
  Status take(int32_t slot);

  // A slot with nothing mapped, which costs unmapping the smallest available one where none is
  // free. Errors: kOutOfMemory (no slot left), kBroken (unmapping failed), kInvalid.
  Result<int32_t> take_empty_slot();

  // Makes `ids` the first chunks of an active slot in which nothing is mapped, with references of
  // its own; all or nothing. Errors: kInvalid (also for chunks that nobody has live or cached),
  // kDriver, kBroken (the slot is then in that state).
  Status map_shared(int32_t slot, const std::vector<ChunkId>& ids);

  // Maps until active slot slots[i] holds tokens[i] tokens, for all i or for none; never unmaps.
  // A slot may stand in the list once. Where the pool is short, available slots are unmapped, the
  // largest first, and stay so even if the call fails in the end. Errors: kOutOfMemory, kDriver,
  // kInvalid: active slots are as before. kBroken: the same, but for the slots now in that state,
  // or in it since a premap().
  Status extend(size_t n, const int32_t* slots, const int64_t* tokens);

  // Takes chunks that extend() with the same arguments would, in that order, as many as can be had
  // without reclaiming or waiting, and has them mapped on the cache's thread. They count as kv at
  // once. Returns how many. Where mapping fails they are given back, for extend() to try again.
  // Errors: kInvalid, as extend(); broken slots are passed over.
  Result<size_t> premap(size_t n, const int32_t* slots, const int64_t* tokens);

  // Unmaps what an active slot does not need for `tokens` tokens. Errors: kInvalid, kBroken.
  Status truncate(int32_t slot, int64_t tokens);

  // The request is over. The slot becomes available with what is mapped in it, up to the first
  // chunk that somebody else holds too; from there on it is unmapped. A broken slot is repaired and
  // free. Errors: kInvalid, kBroken (the slot no longer belongs to the request even so).
  Status release(int32_t slot);
  // The same, but the cache's thread does the unmapping. The slot cannot be taken before, while the
  // ledger is at once as if it were done: what nobody else holds is available, what is cached is
  // the cache's. Calls that are short of memory or slots wait for it. Where unmapping fails the
  // slot is broken. Errors: kInvalid.
  Status release_async(int32_t slot);
  // Waits until the cache's thread has nothing left to do. Errors: kInvalid.
  Status settle();

  // Unmaps chunks of available slots, the largest slot first, until `bytes` are back in the pool or
  // none is left; retries broken slots that nobody holds. Returns the bytes given back, which may
  // be fewer; dying slots are waited for first and count. Errors: kBroken, kInvalid; it does not
  // stop at the first error.
  Result<size_t> reclaim(size_t bytes);
  Result<size_t> trim_available();

  // Unmaps everything, active slots too, and gives the addresses back, after waiting for what still
  // runs on the device where anything is mapped; if that fails nothing is unmapped. May be
  // repeated: after an error (kBroken, kDriver) it tries what is left, after success it does
  // nothing.
  Status close();

  // Tokens that fit what is mapped: 0 for a slot that is broken or does not exist.
  int64_t mapped_tokens(int32_t slot) const;
  size_t mapped_bytes(int32_t slot) const;
  // kFree for a slot that does not exist.
  SlotState slot_state(int32_t slot) const;
  KvStats stats() const;

  const KvLayout& layout() const { return layout_; }
  const std::shared_ptr<ChunkPool>& pool() const { return pool_; }
  std::byte* slot_base(int32_t slot) const { return base_ + slot * layout_.slot_bytes; }
  // The chunks of a slot in order of their tokens, once nothing is pending there; for the host
  // thread only. Whoever retains or caches one does so while the slot is active.
  const std::vector<ChunkId>& slot_chunks(int32_t slot) const;

 private:
  struct Slot {
    explicit Slot(VirtualTensor t) : tensor(std::move(t)) {}
    Slot(Slot&& other) noexcept : tensor(std::move(other.tensor)) {}

    VirtualTensor tensor;
    bool held = false;  // A request has it. Not the same as kActive: it may have broken meanwhile.
    size_t promised = 0;  // While busy: the chunks that will be mapped if nothing fails.
    std::atomic<SlotState> state{SlotState::kFree};
    std::atomic<int64_t> mapped_chunks{0};  // Sound ones: 0 while broken.
    std::atomic<int64_t> broken_chunks{0};
    std::atomic<int64_t> dying_chunks{0};
  };
  class Entry;

  KvCache(std::shared_ptr<ChunkPool> pool, const KvLayout& layout, std::byte* base);

  bool exists(int64_t slot) const { return slot >= 0 && slot < layout_.num_slots; }
  int32_t index_of(const Slot* slot) const { return static_cast<int32_t>(slot - slots_.data()); }
  Status check_held(int64_t slot, const char* verb) const;
  Status check_tokens(int64_t tokens) const;
  // Whether the host thread may look into the slot.
  bool settled(const Slot& slot) const { return !worker_.busy(index_of(&slot)); }
  // Waits for a dying slot; false if there is none.
  bool await_dying_slot();
  // Waits for the dying slots. Returns the chunks that came back.
  size_t await_dying_slots();
  Status no_slot_left() const;
  int32_t hand_out(Slot* slot);
  // Makes what readers see follow the tensor and `held`.
  void publish(Slot* slot);
  Status acquire(size_t n, const std::vector<Destination>& where, std::vector<ChunkId>* ids);
  // Maps ids[...] for extend(), or leaves every slot as before.
  Status map_all(size_t n, const int32_t* slots, const int64_t* tokens,
                 const std::vector<ChunkId>& ids);
  // Ends the request of a settled slot as far as the ledger is concerned. Returns the chunks to
  // keep mapped.
  size_t let_go(Slot* slot);
  // Unmaps the rest of it. Runs on either thread.
  Status unmap_dead(Slot* slot, size_t keep);
  Status reclaim_chunks(size_t n, size_t* given);
  bool anything_mapped() const;

  const std::shared_ptr<ChunkPool> pool_;
  const KvLayout layout_;
  std::byte* const base_;
  MapStats map_stats_;
  std::vector<Slot> slots_;
  std::vector<uint64_t> last_seen_;  // Per slot: the last extend() that named it.
  uint64_t extend_calls_ = 0;
  mutable SlotWorker worker_;
  bool closed_ = false;
  bool addresses_released_ = false;
  bool may_be_touched_ = false;  // Waiting for the device has failed: close() was refused.
  std::atomic<bool> busy_{false};
};

}  // namespace ellm
