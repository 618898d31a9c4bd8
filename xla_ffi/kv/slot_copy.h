// Moves the chunks of a KV slot to and from the host tier.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kv/kv_cache.h"
#include "memory/copy_engine.h"

namespace ellm {

// Copies between chunks [first_tile, first_tile + blocks.size()) of the slot and `blocks`; see
// Copier for what the caller keeps to. Errors: kInvalid for what cannot be (the slot, the tiles, a
// buffer with other blocks than the cache's chunks, Copier::submit's). A chunk that is not mapped
// when its turn comes, because its slot is too short or broken or the cache closed, is an error of
// Copier::wait().
Result<Ticket> copy_slot(Copier* copier, CopyDirection direction, std::shared_ptr<KvCache> kv,
                         int32_t slot, int64_t first_tile, std::shared_ptr<HostBuffer> buffer,
                         std::vector<BlockId> blocks);

}  // namespace ellm
