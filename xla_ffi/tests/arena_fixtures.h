// What the arena tests share.
#pragma once

#include <cstddef>
#include <memory>
#include <utility>

#include "fixtures.h"
#include "memory/arena.h"

namespace ellm {

inline std::shared_ptr<Arena> make_arena(std::shared_ptr<ChunkPool> pool, size_t chunks) {
  auto arena = Arena::Create(std::move(pool), chunks * page_bytes());
  REQUIRE_OK(arena.status());
  return arena.value();
}

// The arena's own books, and the pool's of it.
inline void check_books(const Arena& arena) {
  const ArenaUsage u = arena.usage();
  CHECK_EQ(u.live + u.inactive, u.mapped);
  CHECK(u.mapped <= u.reserved);
  CHECK_EQ(arena.pool()->usage().activation, u.mapped);
  check_ledger(*arena.pool());
}

}  // namespace ellm
