#include "kv/registry.h"

#include <map>
#include <mutex>
#include <utility>

namespace ellm {
namespace {

struct Registration {
  std::weak_ptr<KvCache> cache;
  std::shared_ptr<Arena> arena;
};

struct Registry {
  std::mutex mutex;
  int32_t last_id = 0;
  std::map<int32_t, Registration> caches;
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
  r.caches.emplace(++r.last_id, Registration{cache, nullptr});
  return r.last_id;
}

std::shared_ptr<KvCache> find_kv(int32_t id) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.caches.find(id);
  return it == r.caches.end() ? nullptr : it->second.cache.lock();
}

void use_arena(int32_t id, std::shared_ptr<Arena> arena) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.caches.find(id);
  if (it != r.caches.end()) it->second.arena.swap(arena);
}

std::shared_ptr<Arena> find_arena(int32_t id) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.caches.find(id);
  return it == r.caches.end() ? nullptr : it->second.arena;
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
