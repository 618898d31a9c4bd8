// What the memory tests share.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <memory>
#include <vector>

#include "check.h"
#include "faulty_driver.h"
#include "kv/kv_cache.h"
#include "memory/chunk_pool.h"
#include "memory/host_driver.h"

namespace ellm {

// A status that has to be ok; prints its message if it is not.
inline bool passed(const Status& s, const char* file, int line) {
  return check::report(s.ok(), file, line, "not ok: " + s.message());
}
#define CHECK_OK(expression) ellm::passed((expression), __FILE__, __LINE__)
#define REQUIRE_OK(expression) \
  if (!CHECK_OK(expression)) throw check::Abandon()

// One page: the smallest chunk that a host driver takes, so that tests stay small.
inline size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

inline std::shared_ptr<HostDriver> host_driver() {
  auto driver = HostDriver::Create();
  REQUIRE_OK(driver.status());
  return driver.value();
}

inline std::shared_ptr<FaultyDriver> faulty_driver() {
  return std::make_shared<FaultyDriver>(host_driver());
}

inline std::shared_ptr<ChunkPool> make_pool(std::shared_ptr<Driver> driver, size_t limit_bytes,
                                            size_t chunk_bytes = page_bytes()) {
  auto pool = ChunkPool::Create(std::move(driver), chunk_bytes, limit_bytes);
  REQUIRE_OK(pool.status());
  return pool.value();
}

// Chunks of one page with 8 tokens each: 2 layers, 2 heads of 16 floats take 4096 bytes.
inline KvLayout page_layout(int64_t num_slots, int64_t max_tokens) {
  KvLayout layout;
  layout.layers = 2;
  layout.kv_heads = 2;
  layout.head_dim = 16;
  layout.element_bytes = 4;
  layout.tile_tokens = 8;
  layout.chunk_bytes = static_cast<int64_t>(page_bytes());
  layout.num_slots = num_slots;
  layout.max_tokens = max_tokens;
  layout.slot_bytes = layout.chunks_for(max_tokens) * layout.chunk_bytes;
  return layout;
}

inline std::shared_ptr<KvCache> make_cache(std::shared_ptr<ChunkPool> pool,
                                           const KvLayout& layout) {
  auto cache = KvCache::Create(std::move(pool), layout);
  REQUIRE_OK(cache.status());
  return cache.value();
}

inline Status extend(KvCache& cache, const std::vector<int32_t>& slots,
                     const std::vector<int64_t>& tokens) {
  return cache.extend(slots.size(), slots.data(), tokens.data());
}

// Whether the byte can be read, without trying it: the kernel copies it, or says EFAULT.
inline bool readable(const std::byte* at) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const bool copied = write(ends[1], at, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return copied;
}

// Invariant 1 and the physical rule.
inline void check_ledger(const ChunkPool& pool) {
  const Usage u = pool.usage();
  CHECK_EQ(u.free + u.kv + u.cache + u.activation + u.weights + u.workspace, u.limit);
  CHECK_EQ(u.obtainable + u.available, u.free);
  CHECK(u.physical <= u.limit);
  CHECK(u.backed_free <= u.obtainable);
}

}  // namespace ellm
