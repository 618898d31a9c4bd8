#include "kv/kv_cache.h"

#include <algorithm>
#include <string>

#include "kv/entry.h"
#include "memory/text.h"

namespace ellm {
const char* slot_state_name(SlotState state) {
  switch (state) {
    case SlotState::kFree:
      return "free";
    case SlotState::kActive:
      return "active";
    case SlotState::kAvailable:
      return "available";
    case SlotState::kDying:
      return "dying";
    case SlotState::kBroken:
      return "broken";
  }
  return "unknown";
}

Result<std::shared_ptr<KvCache>> KvCache::Create(std::shared_ptr<ChunkPool> pool,
                                                 const KvLayout& layout) {
  if (Status s = layout.validate(); !s.ok()) return s;
  if (pool->chunk_bytes() != static_cast<size_t>(layout.chunk_bytes)) {
    return Status(Code::kInvalid, "the layout has chunks of " + human_bytes(layout.chunk_bytes) +
                                      ", the pool of " + human_bytes(pool->chunk_bytes()) +
                                      "; make the pool with the layout's");
  }
  Driver& driver = pool->driver();
  std::byte* base = nullptr;
  if (Status s = driver.reserve(layout.reserved_bytes(),
                                std::max(pool->chunk_bytes(), driver.large_bytes()), &base);
      !s.ok()) {
    return s;
  }
  return std::shared_ptr<KvCache>(new KvCache(std::move(pool), layout, base));
}

KvCache::KvCache(std::shared_ptr<ChunkPool> pool, const KvLayout& layout, std::byte* base)
    : pool_(std::move(pool)),
      layout_(layout),
      base_(base),
      last_seen_(layout.num_slots, 0),
      worker_(layout.num_slots) {
  slots_.reserve(layout_.num_slots);
  for (int64_t i = 0; i < layout_.num_slots; ++i) {
    slots_.emplace_back(VirtualTensor(pool_.get(), &map_stats_, base_ + i * layout_.slot_bytes,
                                      static_cast<size_t>(layout_.slot_chunks())));
  }
}

KvCache::~KvCache() {
  (void)close();
  if (!may_be_touched_) return;
  for (Slot& slot : slots_) slot.tensor.abandon();
}

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

size_t KvCache::await_dying_slots() {
  size_t back = 0;
  for (Slot& slot : slots_) {
    if (slot.held || settled(slot)) continue;
    worker_.wait_for(index_of(&slot));
    if (slot.tensor.state() == TensorState::kBroken) continue;
    back += static_cast<size_t>(slot.dying_chunks.load(std::memory_order_relaxed));
  }
  return back;
}

bool KvCache::await_dying_slot() {
  for (const Slot& slot : slots_) {
    if (slot.held || settled(slot)) continue;
    worker_.wait_for(index_of(&slot));
    return true;
  }
  return false;
}

Status KvCache::no_slot_left() const {
  return Status(Code::kOutOfMemory, "a slot was asked for, but all " +
                                        std::to_string(layout_.num_slots) +
                                        " are in use; finish a request or have more slots");
}

int32_t KvCache::hand_out(Slot* slot) {
  slot->held = true;
  slot->tensor.revive();
  publish(slot);
  return index_of(slot);
}

Result<int32_t> KvCache::take_slot(int64_t tokens) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_tokens(tokens); !s.ok()) return s;
  const auto need = static_cast<size_t>(layout_.chunks_for(tokens));
  do {
    Slot* best_fit = nullptr;
    Slot* unmapped = nullptr;
    Slot* largest = nullptr;
    for (Slot& slot : slots_) {
      if (slot.held || !settled(slot)) continue;
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
    if (slot != nullptr) return hand_out(slot);
  } while (await_dying_slot());
  return no_slot_left();
}

Status KvCache::take(int32_t slot_id) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (!exists(slot_id)) return check_held(slot_id, "take");
  Slot& slot = slots_[slot_id];
  if (slot.held) {
    return Status(Code::kOutOfMemory, "slot " + std::to_string(slot_id) +
                                          " was asked for, but it is in use; take another one");
  }
  worker_.wait_for(slot_id);
  if (slot.tensor.state() == TensorState::kBroken) {
    if (Status s = unmap_dead(&slot, 0); !s.ok()) return of_slot(slot_id, s);
  }
  (void)hand_out(&slot);
  return Status::Ok();
}

Result<int32_t> KvCache::take_empty_slot() {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  Status failure = no_slot_left();
  for (;;) {
    Slot* smallest = nullptr;
    for (Slot& slot : slots_) {
      if (slot.held || !settled(slot)) continue;
      const SlotState state = slot.state.load(std::memory_order_relaxed);
      if (state == SlotState::kFree) return hand_out(&slot);
      if (state != SlotState::kAvailable) continue;
      if (smallest == nullptr || slot.tensor.chunks().size() < smallest->tensor.chunks().size()) {
        smallest = &slot;
      }
    }
    if (smallest == nullptr) {
      if (!await_dying_slot()) return failure;
      continue;
    }
    Status s = unmap_dead(smallest, 0);
    if (s.ok()) return hand_out(smallest);
    failure = of_slot(index_of(smallest), s);  // That slot is broken now; there may be others.
  }
}

size_t KvCache::let_go(Slot* slot) {
  slot->held = false;
  if (slot->tensor.state() == TensorState::kBroken) {
    slot->dying_chunks.store(0, std::memory_order_relaxed);
    return 0;
  }
  const Retired retired = slot->tensor.retire();
  slot->dying_chunks.store(static_cast<int64_t>(retired.exclusive - retired.leading),
                           std::memory_order_relaxed);
  return retired.leading;
}

Status KvCache::unmap_dead(Slot* slot, size_t keep) {
  Status s = Status::Ok();
  if (slot->tensor.state() == TensorState::kBroken) {
    s = slot->tensor.repair();
  } else {
    slot->mapped_chunks.store(static_cast<int64_t>(keep), std::memory_order_release);
    s = slot->tensor.truncate(keep);
    if (!s.ok()) slot->tensor.revive();  // Out of reach, so it must not be counted as free.
  }
  publish(slot);
  return s;
}

Status KvCache::release(int32_t slot_id) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_held(slot_id, "release"); !s.ok()) return s;
  worker_.wait_for(slot_id);
  Slot& slot = slots_[slot_id];
  Status s = unmap_dead(&slot, let_go(&slot));
  return s.ok() ? s : of_slot(slot_id, s);
}

Status KvCache::release_async(int32_t slot_id) {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  if (Status s = check_held(slot_id, "release"); !s.ok()) return s;
  worker_.wait_for(slot_id);
  Slot& slot = slots_[slot_id];
  const size_t keep = let_go(&slot);
  if (slot.tensor.state() != TensorState::kBroken) {
    if (keep == slot.tensor.chunks().size()) {
      publish(&slot);
      return Status::Ok();
    }
    slot.mapped_chunks.store(static_cast<int64_t>(keep), std::memory_order_release);
    slot.state.store(SlotState::kDying, std::memory_order_release);
  }
  pool_->expect_return();
  worker_.post({{slot_id, [this, &slot, keep] {
                   (void)unmap_dead(&slot, keep);  // A failure shows in the slot's state.
                   pool_->return_settled();
                 }}});
  return Status::Ok();
}

Status KvCache::settle() {
  Entry entry(this);
  if (Status s = entry.status_if_open(); !s.ok()) return s;
  worker_.settle();
  return Status::Ok();
}

Status KvCache::reclaim_chunks(size_t n, size_t* given) {
  *given = 0;
  if (n == 0) return Status::Ok();
  *given = await_dying_slots();
  Status first = Status::Ok();
  const auto unmap = [&](Slot* slot, size_t keep) {
    const size_t before = slot->tensor.chunks().size();
    Status s = unmap_dead(slot, keep);
    *given += before - slot->tensor.chunks().size();
    if (!s.ok() && first.ok()) first = of_slot(index_of(slot), s);
  };
  for (Slot& slot : slots_) {
    if (*given >= n) return first;
    if (!slot.held && slot.tensor.state() == TensorState::kBroken) unmap(&slot, 0);
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
    unmap(largest, before - std::min(before, n - *given));
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

bool KvCache::anything_mapped() const {
  return std::any_of(slots_.begin(), slots_.end(),
                     [](const Slot& slot) { return !slot.tensor.chunks().empty(); });
}

Status KvCache::close() {
  Entry entry(this);
  if (Status s = entry.status(); !s.ok()) return s;
  closed_ = true;
  worker_.stop();
  if (addresses_released_) return Status::Ok();
  if (anything_mapped()) {
    Status s = pool_->driver().synchronize();
    may_be_touched_ = !s.ok();
    if (!s.ok()) {
      return Status(Code::kBroken,
                    "the KV cache stays mapped, because a step may still use it: " + s.message());
    }
  }
  Status first = Status::Ok();
  for (Slot& slot : slots_) {
    slot.held = false;
    slot.mapped_chunks.store(0, std::memory_order_release);
    Status s = slot.tensor.release();
    if (!s.ok()) {
      slot.tensor.revive();
      if (first.ok()) first = of_slot(index_of(&slot), s);
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
  if (!exists(slot)) return none;
  worker_.wait_for(slot);
  return slots_[slot].tensor.chunks();
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
      case SlotState::kDying:
        ++stats.dying_slots;
        stats.available_bytes += bytes;
        stats.dying_bytes +=
            slot.dying_chunks.load(std::memory_order_relaxed) * layout_.chunk_bytes;
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
