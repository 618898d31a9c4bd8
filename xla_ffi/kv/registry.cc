#include "kv/registry.h"

#include <map>
#include <mutex>

namespace ellm {
namespace {

struct Registry {
  std::mutex mutex;
  int32_t last_id = 0;
  std::map<int32_t, std::weak_ptr<KvCache>> caches;
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
  r.caches.emplace(++r.last_id, cache);
  return r.last_id;
}

std::shared_ptr<KvCache> find_kv(int32_t id) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  const auto it = r.caches.find(id);
  return it == r.caches.end() ? nullptr : it->second.lock();
}

void unregister_kv(int32_t id) {
  Registry& r = registry();
  std::lock_guard<std::mutex> lock(r.mutex);
  r.caches.erase(id);
}

}  // namespace ellm
