#include "kv/registry.h"

#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace ellm {
namespace {

struct Registration {
  std::weak_ptr<KvCache> cache;
  std::shared_ptr<Arena> arena;
  std::map<int32_t, int32_t> ids_by_device;  // Of a group; empty for a cache.
  int ordinal = -1;                          // Of the cache's memory, as Driver has it.

  bool within_reach_of(int32_t device_ordinal) const {
    return ordinal < 0 || ordinal == device_ordinal;
  }
};

struct Registry {
  std::mutex mutex;
  int32_t last_id = 0;
  std::map<int32_t, Registration> caches;

  // With the mutex held. Null if there is none.
  Registration* find(int32_t id, int32_t device_ordinal) {
    auto it = caches.find(id);
    if (it != caches.end() && !it->second.ids_by_device.empty()) {
      const auto member = it->second.ids_by_device.find(device_ordinal);
      if (member == it->second.ids_by_device.end()) return nullptr;
      it = caches.find(member->second);
    }
    if (it == caches.end() || !it->second.within_reach_of(device_ordinal)) return nullptr;
    return &it->second;
  }
};

// Never destroyed: a handler may still look something up while the process ends.
Registry& registry() {
  static auto* const instance = new Registry;
  return *instance;
}

}  // namespace

int32_t register_kv(const std::shared_ptr<KvCache>& cache) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.caches.emplace(++r.last_id,
                   Registration{cache, nullptr, {}, cache->pool()->driver().ordinal()});
  return r.last_id;
}

Result<int32_t> register_kv_group(std::map<int32_t, int32_t> ids_by_device) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  for (const auto& [device, id] : ids_by_device) {
    const auto member = r.caches.find(id);
    if (member == r.caches.end() || member->second.within_reach_of(device)) continue;
    return Status(Code::kInvalid, "KV cache " + std::to_string(id) + " is named for device " +
                                      std::to_string(device) + ", but its memory is on device " +
                                      std::to_string(member->second.ordinal) +
                                      "; name each cache for the device of its pool");
  }
  r.caches.emplace(++r.last_id, Registration{{}, nullptr, std::move(ids_by_device)});
  return r.last_id;
}

std::shared_ptr<KvCache> find_kv(int32_t id, int32_t device_ordinal) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const Registration* found = r.find(id, device_ordinal);
  return found == nullptr ? nullptr : found->cache.lock();
}

void use_arena(int32_t id, std::shared_ptr<Arena> arena) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.caches.find(id);
  if (it != r.caches.end()) it->second.arena.swap(arena);
}

std::shared_ptr<Arena> find_arena(int32_t id, int32_t device_ordinal) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const Registration* found = r.find(id, device_ordinal);
  return found == nullptr ? nullptr : found->arena;
}

void unregister_kv(int32_t id) {
  Registration gone;  // An arena that ends here unmaps without the lock.
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.caches.find(id);
  if (it == r.caches.end()) return;
  gone = std::move(it->second);
  r.caches.erase(it);
}

}  // namespace ellm
