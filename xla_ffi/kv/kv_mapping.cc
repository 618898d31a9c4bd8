// KvCache: what changes the mapping of active slots.
#include <algorithm>
#include <string>
#include <utility>

#include "kv/entry.h"
#include "kv/kv_cache.h"

namespace ellm {

Status KvCache::extend(size_t n, const int32_t* slots, const int64_t* tokens) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  ++extend_calls_;
  size_t missing = 0;
  std::vector<Destination> where;
  for (size_t i = 0; i < n; ++i) {
    if (Status s = check_held(slots[i], "extend"); !s.ok()) return s;
    if (Status s = check_tokens(tokens[i]); !s.ok()) return of_slot(slots[i], s);
    worker_.wait_for(slots[i]);
    const Slot& slot = slots_[slots[i]];
    if (slot.tensor.state() == TensorState::kBroken) {
      return Status(Code::kBroken, "cannot extend slot " + std::to_string(slots[i]) +
                                       ", which is broken: release it");
    }
    if (std::exchange(last_seen_[slots[i]], extend_calls_) == extend_calls_) {
      return Status(Code::kInvalid, "slot " + std::to_string(slots[i]) +
                                        " is listed twice in one extend; list it once");
    }
    const auto need = static_cast<size_t>(layout_.chunks_for(tokens[i]));
    const size_t mapped = slot.tensor.chunks().size();
    if (need <= mapped) continue;
    missing += need - mapped;
    where.push_back({slot.tensor.address_of(mapped), need - mapped});
  }
  if (missing == 0) return Status::Ok();
  std::vector<ChunkId> ids;
  ids.reserve(missing);
  if (Status s = acquire(missing, where, &ids); !s.ok()) return s;
  return map_all(n, slots, tokens, ids);
}

Result<size_t> KvCache::premap(size_t n, const int32_t* slots, const int64_t* tokens) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  for (size_t i = 0; i < n; ++i) {
    if (Status s = check_held(slots[i], "premap"); !s.ok()) return s;
    if (Status s = check_tokens(tokens[i]); !s.ok()) return of_slot(slots[i], s);
  }
  size_t taken = 0;
  std::vector<SlotWorker::Job> jobs;
  for (size_t i = 0; i < n; ++i) {
    Slot& slot = slots_[slots[i]];
    if (settled(slot)) {
      if (slot.tensor.state() == TensorState::kBroken) continue;
      slot.promised = slot.tensor.chunks().size();
    }
    const auto need = static_cast<size_t>(layout_.chunks_for(tokens[i]));
    if (need <= slot.promised) continue;
    const size_t missing = need - slot.promised;
    Claim claim = pool_->claim_up_to(Owner::kKv, {slot.tensor.address_of(slot.promised), missing});
    const size_t got = claim.chunks.size();
    if (got > 0) {
      slot.promised += got;
      taken += got;
      jobs.push_back({slots[i], [this, &slot, claim = std::move(claim)]() mutable {
                        std::vector<ChunkId> ids;
                        ids.reserve(claim.chunks.size());
                        // What fails here is free again, and extend() will report it if it lasts.
                        if (pool_->fill(std::move(claim), &ids).ok()) {
                          (void)slot.tensor.extend(ids);
                        }
                        publish(&slot);
                      }});
    }
    if (got < missing) break;
  }
  if (!jobs.empty()) worker_.post(std::move(jobs));
  return taken;
}

Status KvCache::map_shared(int32_t slot_id, const std::vector<ChunkId>& ids) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_held(slot_id, "map chunks into"); !s.ok()) return s;
  worker_.wait_for(slot_id);
  Slot& slot = slots_[slot_id];
  if (slot.tensor.state() != TensorState::kReserved) {
    return Status(Code::kInvalid, "cannot map shared chunks into slot " + std::to_string(slot_id) +
                                      ", in which something is mapped: take an empty slot");
  }
  Status s = slot.tensor.map_shared(ids);
  publish(&slot);
  return s.ok() ? s : of_slot(slot_id, s);
}

Status KvCache::map_all(size_t n, const int32_t* slots, const int64_t* tokens,
                        const std::vector<ChunkId>& ids) {
  Status failure = Status::Ok();
  size_t used = 0;
  size_t reached = 0;
  for (; reached < n && failure.ok(); ++reached) {
    VirtualTensor& tensor = slots_[slots[reached]].tensor;
    const auto need = static_cast<size_t>(layout_.chunks_for(tokens[reached]));
    if (need <= tensor.chunks().size()) continue;
    const auto first = ids.begin() + static_cast<ptrdiff_t>(used);
    used += need - tensor.chunks().size();
    failure = tensor.extend({first, ids.begin() + static_cast<ptrdiff_t>(used)});
    if (!failure.ok()) failure = of_slot(slots[reached], failure);
  }
  if (!failure.ok()) {
    for (size_t i = 0; i < reached; ++i) {
      Slot& slot = slots_[slots[i]];
      if (slot.tensor.state() == TensorState::kBroken) continue;  // The one that failed.
      const auto before = static_cast<size_t>(slot.mapped_chunks.load(std::memory_order_relaxed));
      if (Status s = slot.tensor.truncate(before); !s.ok()) {
        failure = Status(s.code(), failure.message() + "; then slot " + std::to_string(slots[i]) +
                                       ": " + s.message());
      }
    }
    for (size_t i = used; i < ids.size(); ++i) (void)pool_->release(ids[i]);
  }
  for (size_t i = 0; i < reached; ++i) publish(&slots_[slots[i]]);
  return failure;
}

Status KvCache::acquire(size_t n, const std::vector<Destination>& where,
                        std::vector<ChunkId>* ids) {
  for (;;) {
    Status s = pool_->acquire(Owner::kKv, n, ids, where);
    if (s.code() != Code::kOutOfMemory) return s;
    (void)await_dying_slots();
    const size_t obtainable = pool_->usage().obtainable / pool_->chunk_bytes();
    if (obtainable >= n) continue;  // Another user of the pool has given some back meanwhile.
    size_t available = 0;
    for (const Slot& slot : slots_) {
      if (slot.state == SlotState::kAvailable) available += slot.tensor.chunks().size();
    }
    if (available < n - obtainable) return s;  // Not even all of it would do: keep it.
    size_t given = 0;
    const Status reclaimed = reclaim_chunks(n - obtainable, &given);
    if (given > 0) continue;
    return reclaimed.ok() ? s : Status(s.code(), s.message() + "; " + reclaimed.message());
  }
}

Status KvCache::truncate(int32_t slot_id, int64_t tokens) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_held(slot_id, "truncate"); !s.ok()) return s;
  if (Status s = check_tokens(tokens); !s.ok()) return of_slot(slot_id, s);
  worker_.wait_for(slot_id);
  Slot& slot = slots_[slot_id];
  const auto keep = static_cast<size_t>(layout_.chunks_for(tokens));
  if (slot.tensor.state() != TensorState::kBroken && keep >= slot.tensor.chunks().size()) {
    return Status::Ok();
  }
  // Readers learn of it before the memory goes.
  slot.mapped_chunks.store(static_cast<int64_t>(keep), std::memory_order_release);
  Status s = slot.tensor.truncate(keep);
  publish(&slot);
  return s.ok() ? s : of_slot(slot_id, s);
}

}  // namespace ellm
