// Finds a KV cache by a number that may stand in a compiled program.
#pragma once

#include <cstdint>
#include <map>
#include <memory>

#include "kv/kv_cache.h"
#include "memory/arena.h"

namespace ellm {

// Process-wide and thread-safe. Ids are 1, 2, ... and never used twice. The registry keeps no cache
// alive; whoever found one does, for as long as it holds the pointer.
int32_t register_kv(const std::shared_ptr<KvCache>& cache);
// A number for several registered caches, one per device, given as ids by device ordinal: a program
// that runs on all of these devices names them by it, and a handler finds that of its own device.
// Errors: kInvalid, where the memory of a cache is on another device than it is named for.
Result<int32_t> register_kv_group(std::map<int32_t, int32_t> ids_by_device);
// The cache with this id, or of this group on that device. A cache that is not named through a
// group is the same for every device that can touch its memory (Driver::ordinal). Null if there is
// none (any more), or it is another device's.
std::shared_ptr<KvCache> find_kv(int32_t id, int32_t device_ordinal = 0);
// The kernels of the cache with this id take their workspaces from the arena from now on, which is
// kept for as long as the cache is registered; null ends it. No-op if there is no such cache.
void use_arena(int32_t id, std::shared_ptr<Arena> arena);
// That of the cache that find_kv() finds. Null if it has none, or there is no such cache.
std::shared_ptr<Arena> find_arena(int32_t id, int32_t device_ordinal = 0);
// Takes a cache or a group out. No-op if there is none.
void unregister_kv(int32_t id);

}  // namespace ellm
