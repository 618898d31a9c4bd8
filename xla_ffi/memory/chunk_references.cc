// ChunkPool: who refers to a chunk, and the owner that follows from it.
#include <string>
#include <utility>

#include "memory/chunk_pool.h"

namespace ellm {
namespace {

std::string name_of(ChunkId id) {
  return "chunk " + std::to_string(id & UINT32_MAX) + " of generation " + std::to_string(id >> 32);
}

Status unknown_chunk(ChunkId id) {
  return Status(Code::kInvalid,
                name_of(id) + " has no owner: it was released before, or never existed");
}

}  // namespace

const ChunkPool::Chunk* ChunkPool::find(ChunkId id) const {
  const size_t index = id & UINT32_MAX;
  if (index >= chunks_.size()) return nullptr;
  const Chunk& chunk = chunks_[index];
  return chunk.held() && chunk.generation == id >> 32 ? &chunk : nullptr;
}

ChunkPool::Chunk* ChunkPool::find(ChunkId id) {
  return const_cast<Chunk*>(std::as_const(*this).find(id));
}

void ChunkPool::update_owner(ChunkId id) {
  const auto index = static_cast<uint32_t>(id & UINT32_MAX);
  Chunk& chunk = chunks_[index];
  if (!chunk.held()) {
    subtract(chunk.owner, chunk_bytes_);
    backed_.add(chunk.handle, index);
    return;
  }
  const Owner owner = chunk.live > 0 ? chunk.acquired_for
                      : chunk.cached ? Owner::kCache
                                     : Owner::kAvailable;
  if (owner == chunk.owner) return;
  subtract(chunk.owner, chunk_bytes_);
  add(owner, chunk_bytes_);
  chunk.owner = owner;
}

Status ChunkPool::retain(const std::vector<ChunkId>& ids) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const ChunkId id : ids) {
    const Chunk* chunk = find(id);
    if (chunk == nullptr) return unknown_chunk(id);
    if (chunk->live == 0 && !chunk->cached) {
      return Status(Code::kInvalid, name_of(id) +
                                        " cannot be shared any more: only a dead slot still has "
                                        "it; share a chunk of an active slot or a cached one");
    }
  }
  for (const ChunkId id : ids) {
    ++find(id)->live;
    update_owner(id);
  }
  return Status::Ok();
}

Status ChunkPool::release(const std::vector<ChunkId>& ids, Reference kind) {
  std::lock_guard<std::mutex> lock(mutex_);
  Status first = Status::Ok();
  for (const ChunkId id : ids) {
    Chunk* chunk = find(id);
    uint32_t* count = nullptr;
    if (chunk != nullptr) count = kind == Reference::kLive ? &chunk->live : &chunk->idle;
    if (count == nullptr || *count == 0) {
      if (first.ok()) first = unknown_chunk(id);
      continue;
    }
    --*count;
    update_owner(id);
  }
  return first;
}

Retired ChunkPool::retire(const std::vector<ChunkId>& ids) {
  std::lock_guard<std::mutex> lock(mutex_);
  Retired found{0, 0};
  for (size_t i = 0; i < ids.size(); ++i) {
    Chunk* chunk = find(ids[i]);
    if (chunk->live == 1 && chunk->idle == 0 && !chunk->cached) {
      if (found.leading == i) ++found.leading;
      ++found.exclusive;
    }
    --chunk->live;
    ++chunk->idle;
    update_owner(ids[i]);
  }
  return found;
}

void ChunkPool::revive(const std::vector<ChunkId>& ids) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const ChunkId id : ids) {
    Chunk* chunk = find(id);
    --chunk->idle;
    ++chunk->live;
    update_owner(id);
  }
}

Status ChunkPool::cache(const std::vector<ChunkId>& ids) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < ids.size(); ++i) {
    Chunk* chunk = find(ids[i]);
    const bool is_live_kv =
        chunk != nullptr && chunk->live > 0 && chunk->acquired_for == Owner::kKv;
    if (is_live_kv && !std::exchange(chunk->cached, true)) continue;
    // A chunk with a live reference keeps its owner, so there is nothing else to undo.
    for (size_t done = 0; done < i; ++done) find(ids[done])->cached = false;
    if (chunk == nullptr) return unknown_chunk(ids[i]);
    return Status(Code::kInvalid, name_of(ids[i]) + " cannot be cached: " +
                                      (is_live_kv ? "it is cached already; cache it once"
                                                  : "it is in no active slot; cache the chunks "
                                                    "of a request before it is released"));
  }
  return Status::Ok();
}

Result<size_t> ChunkPool::uncache(const std::vector<ChunkId>& ids) {
  std::lock_guard<std::mutex> lock(mutex_);
  // By index: what nobody else holds cannot be found by its id any more.
  const auto chunk_of = [this](ChunkId id) -> Chunk& { return chunks_[id & UINT32_MAX]; };
  for (size_t i = 0; i < ids.size(); ++i) {
    Chunk* chunk = find(ids[i]);
    if (chunk != nullptr && std::exchange(chunk->cached, false)) continue;
    for (size_t done = 0; done < i; ++done) chunk_of(ids[done]).cached = true;
    return Status(Code::kInvalid, name_of(ids[i]) + " is not cached, so that the cache cannot " +
                                      "give it up; name each cached chunk once");
  }
  size_t given = 0;
  for (const ChunkId id : ids) {
    if (chunk_of(id).live == 0) given += chunk_bytes_;
    update_owner(id);
  }
  return given;
}

Result<Handle> ChunkPool::handle(ChunkId id) const {
  std::lock_guard<std::mutex> lock(mutex_);
  const Chunk* chunk = find(id);
  if (chunk == nullptr) return unknown_chunk(id);
  return chunk->handle;
}

}  // namespace ellm
