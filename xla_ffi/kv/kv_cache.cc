#include "kv/kv_cache.h"

#include <algorithm>
#include <string>

#include "memory/text.h"

namespace ellm {
namespace {

Status of_slot(int64_t slot, const Status& s) {
  return Status(s.code(), "slot " + std::to_string(slot) + ": " + s.message());
}

}  // namespace

const char* slot_state_name(SlotState state) {
  switch (state) {
    case SlotState::kFree:
      return "free";
    case SlotState::kActive:
      return "active";
    case SlotState::kAvailable:
      return "available";
    case SlotState::kBroken:
      return "broken";
  }
  return "unknown";
}

// Lets one thread at a time past, and none past close().
class KvCache::Entry {
 public:
  explicit Entry(KvCache* cache) : cache_(cache), first_(!cache->busy_.exchange(true)) {}
  ~Entry() {
    if (first_) cache_->busy_.store(false);
  }
  Status status() const {
    if (!first_) {
      return Status(Code::kInvalid,
                    "two threads change the KV cache at once; use it from one thread");
    }
    return Status::Ok();
  }
  Status status_if_open() const {
    if (first_ && cache_->closed_) {
      return Status(Code::kInvalid, "the KV cache is closed; make a new one");
    }
    return status();
  }

 private:
  KvCache* cache_;
  bool first_;
};

Result<std::shared_ptr<KvCache>> KvCache::Create(std::shared_ptr<ChunkPool> pool,
                                                 const KvLayout& layout) {
  if (Status s = layout.validate(); !s.ok()) return s;
  if (pool->chunk_bytes() != static_cast<size_t>(layout.chunk_bytes)) {
    return Status(Code::kInvalid, "the layout has chunks of " + human_bytes(layout.chunk_bytes) +
                                      ", the pool of " + human_bytes(pool->chunk_bytes()) +
                                      "; make the pool with the layout's");
  }
  std::byte* base = nullptr;
  if (Status s = pool->driver().reserve(layout.reserved_bytes(), pool->chunk_bytes(), &base);
      !s.ok()) {
    return s;
  }
  return std::shared_ptr<KvCache>(new KvCache(std::move(pool), layout, base));
}

KvCache::KvCache(std::shared_ptr<ChunkPool> pool, const KvLayout& layout, std::byte* base)
    : pool_(std::move(pool)), layout_(layout), base_(base), last_seen_(layout.num_slots, 0) {
  slots_.reserve(layout_.num_slots);
  for (int64_t i = 0; i < layout_.num_slots; ++i) {
    slots_.emplace_back(VirtualTensor(pool_.get(), &map_stats_, base_ + i * layout_.slot_bytes,
                                      static_cast<size_t>(layout_.slot_chunks())));
  }
}

KvCache::~KvCache() { (void)close(); }

Status KvCache::check_held(int64_t slot, const char* verb) const {
  if (!exists(slot)) {
    return Status(Code::kInvalid, std::string("cannot ") + verb + " slot " + std::to_string(slot) +
                                      ": there are " + std::to_string(layout_.num_slots) +
                                      " slots, from 0");
  }
  if (slots_[slot].held) return Status::Ok();
  return Status(Code::kInvalid, std::string("cannot ") + verb + " slot " + std::to_string(slot) +
                                    ", which is " + slot_state_name(slots_[slot].state) +
                                    ": take it first");
}

Status KvCache::check_tokens(int64_t tokens) const {
  if (tokens >= 0 && tokens <= layout_.max_tokens) return Status::Ok();
  return Status(Code::kInvalid, std::to_string(tokens) +
                                    " tokens were asked for; a slot holds from 0 to " +
                                    std::to_string(layout_.max_tokens));
}

void KvCache::publish(Slot* slot) {
  const bool broken = slot->tensor.state() == TensorState::kBroken;
  const auto chunks = static_cast<int64_t>(slot->tensor.chunks().size());
  slot->mapped_chunks.store(broken ? 0 : chunks, std::memory_order_release);
  slot->broken_chunks.store(broken ? chunks : 0, std::memory_order_relaxed);
  SlotState state = SlotState::kFree;
  if (broken) {
    state = SlotState::kBroken;
  } else if (slot->held) {
    state = SlotState::kActive;
  } else if (chunks > 0) {
    state = SlotState::kAvailable;
  }
  slot->state.store(state, std::memory_order_release);
}

void KvCache::give_to(Slot* slot, Owner owner) {
  // Cannot fail: the tensor holds a reference to each.
  for (const ChunkId id : slot->tensor.chunks()) (void)pool_->reassign(id, owner);
}

Result<int32_t> KvCache::take_slot(int64_t tokens) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_tokens(tokens); !s.ok()) return s;
  const auto need = static_cast<size_t>(layout_.chunks_for(tokens));
  Slot* best_fit = nullptr;
  Slot* unmapped = nullptr;
  Slot* largest = nullptr;
  for (Slot& slot : slots_) {
    const size_t mapped = slot.tensor.chunks().size();
    const SlotState state = slot.state.load(std::memory_order_relaxed);
    if (state == SlotState::kFree && unmapped == nullptr) unmapped = &slot;
    if (state != SlotState::kAvailable) continue;
    if (largest == nullptr || mapped > largest->tensor.chunks().size()) largest = &slot;
    if (mapped >= need && (best_fit == nullptr || mapped < best_fit->tensor.chunks().size())) {
      best_fit = &slot;
    }
  }
  Slot* const slot = best_fit != nullptr ? best_fit : unmapped != nullptr ? unmapped : largest;
  if (slot == nullptr) {
    return Status(Code::kOutOfMemory, "a slot was asked for, but all " +
                                          std::to_string(layout_.num_slots) +
                                          " are in use; finish a request or have more slots");
  }
  slot->held = true;
  give_to(slot, Owner::kKv);
  publish(slot);
  return static_cast<int32_t>(slot - slots_.data());
}

Status KvCache::extend(size_t n, const int32_t* slots, const int64_t* tokens) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  ++extend_calls_;
  size_t missing = 0;
  for (size_t i = 0; i < n; ++i) {
    if (Status s = check_held(slots[i], "extend"); !s.ok()) return s;
    if (Status s = check_tokens(tokens[i]); !s.ok()) return of_slot(slots[i], s);
    const Slot& slot = slots_[slots[i]];
    if (slot.tensor.state() == TensorState::kBroken) {
      return Status(Code::kInvalid, "cannot extend slot " + std::to_string(slots[i]) +
                                        ", which is broken: release it");
    }
    if (std::exchange(last_seen_[slots[i]], extend_calls_) == extend_calls_) {
      return Status(Code::kInvalid, "slot " + std::to_string(slots[i]) +
                                        " is listed twice in one extend; list it once");
    }
    const auto need = static_cast<size_t>(layout_.chunks_for(tokens[i]));
    missing += need - std::min(need, slot.tensor.chunks().size());
  }
  if (missing == 0) return Status::Ok();
  std::vector<ChunkId> ids;
  ids.reserve(missing);
  if (Status s = acquire(missing, &ids); !s.ok()) return s;
  return map_all(n, slots, tokens, ids);
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

Status KvCache::acquire(size_t n, std::vector<ChunkId>* ids) {
  for (;;) {
    Status s = pool_->acquire(Owner::kKv, n, ids);
    if (s.code() != Code::kOutOfMemory) return s;
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

Status KvCache::release(int32_t slot_id) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_held(slot_id, "release"); !s.ok()) return s;
  Slot& slot = slots_[slot_id];
  slot.held = false;
  Status s = Status::Ok();
  if (slot.tensor.state() == TensorState::kBroken) {
    s = slot.tensor.repair();
  } else {
    const std::vector<ChunkId>& chunks = slot.tensor.chunks();
    const auto shared = std::find_if(chunks.begin(), chunks.end(), [this](ChunkId id) {
      const Result<uint32_t> references = pool_->references(id);
      return !references.ok() || references.value() != 1;
    });
    const auto keep = static_cast<size_t>(shared - chunks.begin());
    slot.mapped_chunks.store(static_cast<int64_t>(keep), std::memory_order_release);
    s = slot.tensor.truncate(keep);
    if (s.ok()) give_to(&slot, Owner::kAvailable);
  }
  publish(&slot);
  return s.ok() ? s : of_slot(slot_id, s);
}

Status KvCache::reclaim_chunks(size_t n, size_t* given) {
  Status first = Status::Ok();
  const auto settle = [&](Slot* slot, size_t before, const Status& s) {
    *given += before - slot->tensor.chunks().size();
    if (!s.ok()) {
      // Out of reach, so it must not be counted as free.
      if (slot->state == SlotState::kAvailable) give_to(slot, Owner::kKv);
      if (first.ok()) first = of_slot(slot - slots_.data(), s);
    }
    publish(slot);
  };
  *given = 0;
  for (Slot& slot : slots_) {
    if (*given >= n) return first;
    if (slot.held || slot.tensor.state() != TensorState::kBroken) continue;
    const size_t before = slot.tensor.chunks().size();
    settle(&slot, before, slot.tensor.repair());
  }
  while (*given < n) {
    Slot* largest = nullptr;
    for (Slot& slot : slots_) {
      if (slot.state.load(std::memory_order_relaxed) != SlotState::kAvailable) continue;
      if (largest == nullptr || slot.tensor.chunks().size() > largest->tensor.chunks().size()) {
        largest = &slot;
      }
    }
    if (largest == nullptr) break;
    const size_t before = largest->tensor.chunks().size();
    const size_t keep = before - std::min(before, n - *given);
    largest->mapped_chunks.store(static_cast<int64_t>(keep), std::memory_order_release);
    settle(largest, before, largest->tensor.truncate(keep));
  }
  return first;
}

Result<size_t> KvCache::reclaim(size_t bytes) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  const size_t chunk_bytes = pool_->chunk_bytes();
  size_t given;
  Status s = reclaim_chunks(bytes / chunk_bytes + (bytes % chunk_bytes != 0 ? 1 : 0), &given);
  if (!s.ok()) return s;
  return given * chunk_bytes;
}

Result<size_t> KvCache::trim_available() { return reclaim(SIZE_MAX); }

Status KvCache::close() {
  Entry entry(this);
  if (Status s = entry.status(); !s.ok()) return s;
  closed_ = true;
  if (addresses_released_) return Status::Ok();
  Status first = Status::Ok();
  for (Slot& slot : slots_) {
    slot.held = false;
    slot.mapped_chunks.store(0, std::memory_order_release);
    Status s = slot.tensor.release();
    if (!s.ok()) {
      if (slot.state == SlotState::kAvailable) give_to(&slot, Owner::kKv);
      if (first.ok()) first = of_slot(&slot - slots_.data(), s);
    }
    publish(&slot);
  }
  if (!first.ok()) return first;
  Status s = pool_->driver().release(base_, static_cast<size_t>(layout_.reserved_bytes()));
  addresses_released_ = s.ok();
  return s;
}

int64_t KvCache::mapped_tokens(int32_t slot) const {
  if (!exists(slot)) return 0;
  const int64_t chunks = slots_[slot].mapped_chunks.load(std::memory_order_acquire);
  return std::min(chunks * layout_.tile_tokens, layout_.max_tokens);
}

size_t KvCache::mapped_bytes(int32_t slot) const {
  if (!exists(slot)) return 0;
  return slots_[slot].mapped_chunks.load(std::memory_order_acquire) * layout_.chunk_bytes;
}

SlotState KvCache::slot_state(int32_t slot) const {
  return exists(slot) ? slots_[slot].state.load(std::memory_order_acquire) : SlotState::kFree;
}

const std::vector<ChunkId>& KvCache::slot_chunks(int32_t slot) const {
  static const std::vector<ChunkId> none;
  return exists(slot) ? slots_[slot].tensor.chunks() : none;
}

KvStats KvCache::stats() const {
  KvStats stats{};
  for (const Slot& slot : slots_) {
    const size_t bytes = slot.mapped_chunks.load(std::memory_order_acquire) * layout_.chunk_bytes;
    switch (slot.state.load(std::memory_order_acquire)) {
      case SlotState::kFree:
        ++stats.free_slots;
        break;
      case SlotState::kActive:
        ++stats.active_slots;
        stats.active_bytes += bytes;
        break;
      case SlotState::kAvailable:
        ++stats.available_slots;
        stats.available_bytes += bytes;
        break;
      case SlotState::kBroken:
        ++stats.broken_slots;
        stats.broken_bytes +=
            slot.broken_chunks.load(std::memory_order_relaxed) * layout_.chunk_bytes;
        break;
    }
  }
  stats.map_calls = map_stats_.map_calls;
  stats.map_us = map_stats_.map_ns / 1000;
  stats.unmap_calls = map_stats_.unmap_calls;
  stats.unmap_us = map_stats_.unmap_ns / 1000;
  return stats;
}

}  // namespace ellm
