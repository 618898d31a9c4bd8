// Finds a KV cache by a number that may stand in a compiled program.
#pragma once

#include <cstdint>
#include <memory>

#include "kv/kv_cache.h"
#include "memory/arena.h"

namespace ellm {

// Process-wide and thread-safe. Ids are 1, 2, ... and never used twice. The registry keeps no cache
// alive; whoever found one does, for as long as it holds the pointer.
int32_t register_kv(const std::shared_ptr<KvCache>& cache);
// Null if there is no such cache (any more).
std::shared_ptr<KvCache> find_kv(int32_t id);
// The kernels of the cache with this id take their workspaces from the arena from now on, which is
// kept for as long as the cache is registered; null ends it. No-op if there is no such cache.
void use_arena(int32_t id, std::shared_ptr<Arena> arena);
// Null if the cache has none, or there is no such cache.
std::shared_ptr<Arena> find_arena(int32_t id);
// No-op if there is no such cache.
void unregister_kv(int32_t id);

}  // namespace ellm
