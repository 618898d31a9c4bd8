#include "kv/slot_copy.h"

#include <string>
#include <utility>

#include "memory/text.h"

namespace ellm {

Result<Ticket> copy_slot(Copier* copier, CopyDirection direction, std::shared_ptr<KvCache> kv,
                         int32_t slot, int64_t first_tile, std::shared_ptr<HostBuffer> buffer,
                         std::vector<BlockId> blocks) {
  const KvLayout& layout = kv->layout();
  const auto tiles = static_cast<int64_t>(blocks.size());
  if (slot < 0 || slot >= layout.num_slots) {
    return Status(Code::kInvalid, "there is no slot " + std::to_string(slot) + "; there are " +
                                      std::to_string(layout.num_slots) + ", from 0");
  }
  if (first_tile < 0 || first_tile > layout.slot_chunks() - tiles) {
    return Status(Code::kInvalid, std::to_string(tiles) + " tiles from " +
                                      std::to_string(first_tile) +
                                      " on were to be copied; a slot has " +
                                      std::to_string(layout.slot_chunks()) + ", from 0");
  }
  if (buffer->block_bytes() != static_cast<size_t>(layout.chunk_bytes)) {
    return Status(Code::kInvalid,
                  "the host buffer has blocks of " + human_bytes(buffer->block_bytes()) +
                      ", the KV cache chunks of " + human_bytes(layout.chunk_bytes) +
                      "; make the buffer with the layout's chunk_bytes");
  }
  ChunkAddress chunk = [kv = std::move(kv), slot, first_tile](size_t i) -> Result<std::byte*> {
    const size_t chunk_bytes = kv->layout().chunk_bytes;
    const size_t begin = (static_cast<size_t>(first_tile) + i) * chunk_bytes;
    const size_t mapped = kv->mapped_bytes(slot);
    if (begin + chunk_bytes > mapped) {
      return Status(Code::kInvalid, "tile " + std::to_string(first_tile + i) + " of slot " +
                                        std::to_string(slot) + " was to be copied, but only " +
                                        std::to_string(mapped / chunk_bytes) +
                                        " of its tiles are mapped; extend the slot first, and "
                                        "release it after the copy");
    }
    return kv->slot_base(slot) + begin;
  };
  return copier->submit(direction, std::move(chunk), std::move(buffer), std::move(blocks));
}

}  // namespace ellm
