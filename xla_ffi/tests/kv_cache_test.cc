// KvCache: slots by hand. Random use and failing drivers are in fault_test.cc.
#include "kv/kv_cache.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "fixtures.h"
#include "kv/registry.h"

namespace ellm {
namespace {

// 4 slots of up to 64 tokens (8 chunks) over a pool of 16 chunks.
struct Bench {
  explicit Bench(size_t pool_chunks = 16, int64_t num_slots = 4, int64_t max_tokens = 64)
      : driver(faulty_driver()),
        pool(make_pool(driver, pool_chunks * page_bytes())),
        cache(make_cache(pool, page_layout(num_slots, max_tokens))) {}
  ~Bench() {
    if (cache) CHECK_OK(cache->close());
    check_ledger(*pool);
    CHECK_EQ(pool->usage().free, pool->usage().limit);
    CHECK_OK(pool->trim(0).status());
    CHECK_EQ(driver->leftovers(), "");
    CHECK_EQ(driver->violations(), "");
  }
  // A slot with `tokens` mapped.
  int32_t request(int64_t tokens) {
    auto slot = cache->take_slot(tokens);
    REQUIRE_OK(slot.status());
    REQUIRE_OK(extend(*cache, {slot.value()}, {tokens}));
    return slot.value();
  }
  size_t chunks(size_t bytes) const { return bytes / page_bytes(); }
  SlotState state(int32_t slot) const { return cache->slot_state(slot); }

  std::shared_ptr<FaultyDriver> driver;
  std::shared_ptr<ChunkPool> pool;
  std::shared_ptr<KvCache> cache;
};

TEST(physical_bytes_follow_the_tokens) {
  Bench b(40, 4, 64);
  const int32_t slot = b.cache->take_slot(64).value();
  CHECK_EQ(b.pool->usage().kv, 0u);
  for (int64_t tokens = 0; tokens <= 64; ++tokens) {
    REQUIRE_OK(extend(*b.cache, {slot}, {tokens}));
    const auto expected = static_cast<size_t>((tokens + 7) / 8);
    CHECK_EQ(b.chunks(b.pool->usage().kv), expected);
    CHECK_EQ(b.cache->mapped_tokens(slot), static_cast<int64_t>(expected) * 8);
    CHECK_EQ(b.cache->mapped_bytes(slot), expected * page_bytes());
  }
  CHECK_EQ(b.cache->stats().map_calls, 8u);
  for (int64_t tokens = 63; tokens >= 0; --tokens) {
    REQUIRE_OK(b.cache->truncate(slot, tokens));
    CHECK_EQ(b.chunks(b.pool->usage().kv), static_cast<size_t>((tokens + 7) / 8));
  }
  CHECK_EQ(b.state(slot), SlotState::kActive);
}

TEST(mapped_tokens_end_with_the_slot) {
  Bench b(40, 2, 61);
  const int32_t slot = b.request(61);
  CHECK_EQ(b.cache->mapped_bytes(slot), 8 * page_bytes());
  CHECK_EQ(b.cache->mapped_tokens(slot), 61);
  CHECK_EQ(extend(*b.cache, {slot}, {62}).code(), Code::kInvalid);
}

TEST(memory_ends_where_the_mapping_does) {
  Bench b;
  const int32_t slot = b.request(9);
  const std::byte* base = b.cache->slot_base(slot);
  CHECK(readable(base + b.cache->layout().offset_bytes(1, 1, 1, 15)));
  CHECK(!readable(base + b.cache->layout().offset_bytes(0, 0, 0, 16)));
  REQUIRE_OK(b.cache->truncate(slot, 8));
  CHECK(!readable(base + b.cache->layout().offset_bytes(0, 0, 0, 8)));
}

TEST(a_dead_slot_stays_mapped_and_the_best_fit_is_taken) {
  Bench b;
  const int32_t small = b.request(8), middle = b.request(24), large = b.request(48);
  const uint64_t calls = b.driver->calls();
  for (const int32_t slot : {small, middle, large}) REQUIRE_OK(b.cache->release(slot));
  CHECK_EQ(b.state(middle), SlotState::kAvailable);
  CHECK_EQ(b.pool->usage().kv, 0u);
  CHECK_EQ(b.chunks(b.pool->usage().available), 10u);
  CHECK_EQ(b.cache->mapped_tokens(middle), 24);

  CHECK_EQ(b.cache->take_slot(17).value(), middle);  // The smallest that is enough.
  CHECK_EQ(b.chunks(b.pool->usage().kv), 3u);
  CHECK_EQ(b.cache->take_slot(49).value(), 3);      // None is enough: one with nothing mapped.
  CHECK_EQ(b.cache->take_slot(49).value(), large);  // None of those left: the largest.
  CHECK_EQ(b.cache->take_slot(49).value(), small);
  CHECK_EQ(b.cache->take_slot(0).status().code(), Code::kOutOfMemory);
  CHECK_EQ(b.driver->calls(), calls);  // No call of the driver in all this.
  CHECK_EQ(b.chunks(b.pool->usage().kv), 10u);
}

TEST(extend_is_all_or_nothing_over_slots) {
  Bench b(10);
  const int32_t first = b.request(16), second = b.request(8);
  CHECK_EQ(extend(*b.cache, {first, second}, {48, 48}).code(), Code::kOutOfMemory);
  CHECK_EQ(b.cache->mapped_tokens(first), 16);
  CHECK_EQ(b.cache->mapped_tokens(second), 8);
  CHECK_EQ(b.chunks(b.pool->usage().kv), 3u);
  CHECK_OK(extend(*b.cache, {first, second}, {40, 40}));
  CHECK_EQ(b.pool->usage().free, 0u);
  CHECK_OK(extend(*b.cache, {second, first}, {1, 40}));  // Never shrinks.
  CHECK_EQ(b.cache->mapped_tokens(second), 40);
}

TEST(extend_takes_from_available_slots_the_largest_first) {
  Bench b(10);
  const int32_t one = b.request(8), three = b.request(24), four = b.request(32);
  REQUIRE_OK(b.cache->release(one));
  REQUIRE_OK(b.cache->release(four));
  const int32_t slot = b.cache->take_slot(64).value();
  CHECK_EQ(slot, 3);
  REQUIRE_OK(extend(*b.cache, {slot}, {40}));  // 5 chunks: 2 were free, 3 come from `four`.
  CHECK_EQ(b.cache->mapped_tokens(four), 8);
  CHECK_EQ(b.cache->mapped_tokens(one), 8);
  CHECK_EQ(b.cache->mapped_tokens(three), 24);
  // Too much even with all that is available: that stays mapped.
  CHECK_EQ(extend(*b.cache, {slot}, {64}).code(), Code::kOutOfMemory);
  CHECK_EQ(b.cache->mapped_tokens(four), 8);
  REQUIRE_OK(extend(*b.cache, {slot}, {56}));
  CHECK_EQ(b.state(four), SlotState::kFree);
  CHECK_EQ(b.state(one), SlotState::kFree);
  CHECK_EQ(b.pool->usage().free, 0u);
}

TEST(reclaim_gives_back_what_is_asked_or_what_there_is) {
  Bench b;
  const int32_t two = b.request(16), five = b.request(40), active = b.request(8);
  REQUIRE_OK(b.cache->release(two));
  REQUIRE_OK(b.cache->release(five));
  CHECK_EQ(b.cache->reclaim(0).value(), 0u);
  CHECK_EQ(b.cache->reclaim(page_bytes() + 1).value(), 2 * page_bytes());
  CHECK_EQ(b.cache->mapped_tokens(five), 24);
  CHECK_EQ(b.cache->mapped_tokens(two), 16);
  CHECK_EQ(b.cache->reclaim(SIZE_MAX).value(), 5 * page_bytes());
  CHECK_EQ(b.cache->trim_available().value(), 0u);
  CHECK_EQ(b.cache->mapped_tokens(active), 8);
  CHECK_EQ(b.chunks(b.pool->usage().backed_free), 7u);
}

TEST(shared_chunks_do_not_stay_in_a_dead_slot) {
  Bench b;
  const int32_t slot = b.request(40);
  const std::vector<ChunkId> chunks = b.cache->slot_chunks(slot);
  REQUIRE_OK(b.pool->cache({chunks[2]}));
  REQUIRE_OK(b.cache->release(slot));
  CHECK_EQ(b.state(slot), SlotState::kAvailable);
  CHECK_EQ(b.cache->mapped_tokens(slot), 16);
  CHECK_EQ(b.pool->usage().cache, page_bytes());
  CHECK_EQ(b.pool->usage().available, 2 * page_bytes());

  const int32_t prefix = b.request(24);
  const ChunkId first = b.cache->slot_chunks(prefix)[0];
  REQUIRE_OK(b.pool->retain(first));
  REQUIRE_OK(b.cache->release(prefix));
  CHECK_EQ(b.state(prefix), SlotState::kFree);
  CHECK_OK(b.pool->release(first));
  CHECK_OK(b.pool->uncache({chunks[2]}).status());
}

TEST(slots_that_are_not_ones_own_are_refused) {
  Bench b;
  const int32_t slot = b.request(8);
  REQUIRE_OK(b.cache->release(slot));
  for (const int32_t bad : {slot, int32_t{3}, int32_t{-1}, int32_t{4}, INT32_MIN, INT32_MAX}) {
    CHECK_EQ(b.cache->release(bad).code(), Code::kInvalid);
    CHECK_EQ(b.cache->truncate(bad, 0).code(), Code::kInvalid);
    CHECK_EQ(extend(*b.cache, {bad}, {8}).code(), Code::kInvalid);
  }
  CHECK_EQ(b.cache->mapped_tokens(-1), 0);
  CHECK_EQ(b.cache->mapped_tokens(4), 0);
  CHECK_EQ(b.cache->mapped_bytes(4), 0u);
  CHECK_EQ(b.state(4), SlotState::kFree);
  CHECK(b.cache->slot_chunks(4).empty());
  const int32_t good = b.cache->take_slot(8).value();
  CHECK_EQ(extend(*b.cache, {good}, {-1}).code(), Code::kInvalid);
  CHECK_EQ(extend(*b.cache, {good}, {65}).code(), Code::kInvalid);
  CHECK_EQ(extend(*b.cache, {good}, {INT64_MAX}).code(), Code::kInvalid);
  CHECK_EQ(extend(*b.cache, {good, good}, {8, 16}).code(), Code::kInvalid);
  CHECK_EQ(b.cache->truncate(good, 65).code(), Code::kInvalid);
  CHECK_EQ(b.cache->take_slot(-1).status().code(), Code::kInvalid);
  CHECK_EQ(b.cache->take_slot(65).status().code(), Code::kInvalid);
  CHECK_OK(b.cache->extend(0, nullptr, nullptr));
  CHECK_OK(extend(*b.cache, {good}, {8}));
}

TEST(data_stays_where_it_is_while_a_slot_grows) {
  Bench b(40);
  const int32_t slot = b.request(8), other = b.request(8);
  std::byte* base = b.cache->slot_base(slot);
  const KvLayout& l = b.cache->layout();
  for (int64_t tokens = 1; tokens <= 64; ++tokens) {
    REQUIRE_OK(extend(*b.cache, {other, slot}, {tokens, tokens}));
    base[l.offset_bytes(1, 1, 1, tokens - 1)] = static_cast<std::byte>(tokens);
  }
  CHECK(base == b.cache->slot_base(slot));
  for (int64_t t = 0; t < 64; ++t) {
    CHECK_EQ(static_cast<int64_t>(base[l.offset_bytes(1, 1, 1, t)]), t + 1);
  }
}

TEST(a_cache_with_active_slots_can_go_at_any_time) {
  Bench b;
  b.request(40);
  REQUIRE_OK(b.cache->release(b.request(10)));
  b.request(5);
  b.cache.reset();  // Its destructor; Bench checks that nothing is left.
}

TEST(a_closed_cache_refuses_work_and_reads_as_empty) {
  Bench b;
  const int32_t slot = b.request(40);
  REQUIRE_OK(b.cache->close());
  CHECK_OK(b.cache->close());
  CHECK_EQ(b.cache->take_slot(1).status().code(), Code::kInvalid);
  CHECK_EQ(extend(*b.cache, {slot}, {1}).code(), Code::kInvalid);
  CHECK_EQ(b.cache->release(slot).code(), Code::kInvalid);
  CHECK_EQ(b.cache->truncate(slot, 0).code(), Code::kInvalid);
  CHECK_EQ(b.cache->reclaim(1).status().code(), Code::kInvalid);
  CHECK_EQ(b.cache->mapped_tokens(slot), 0);
  CHECK_EQ(b.cache->stats().free_slots, 4);
}

TEST(a_cache_keeps_its_pool_alive) {
  const auto driver = faulty_driver();
  auto pool = make_pool(driver, 16 * page_bytes());
  auto cache = make_cache(pool, page_layout(4, 64));
  pool.reset();
  const int32_t slot = cache->take_slot(20).value();
  CHECK_OK(extend(*cache, {slot}, {20}));
  cache.reset();
  CHECK_EQ(driver->leftovers(), "");
}

TEST(two_caches_share_one_pool) {
  Bench b(10);
  const auto second = make_cache(b.pool, page_layout(2, 64));
  const int32_t mine = b.request(48);
  const int32_t theirs = second->take_slot(40).value();
  CHECK_EQ(extend(*second, {theirs}, {40}).code(), Code::kOutOfMemory);
  CHECK_OK(extend(*second, {theirs}, {32}));
  REQUIRE_OK(second->release(theirs));
  // What another cache has available is not this one's to take.
  CHECK_EQ(extend(*b.cache, {mine}, {56}).code(), Code::kOutOfMemory);
  CHECK_EQ(second->trim_available().value(), 4 * page_bytes());
  CHECK_OK(extend(*b.cache, {mine}, {56}));
}

TEST(caches_that_do_not_fit_the_pool_are_refused) {
  const auto pool = make_pool(memory_driver(), 1 << 20, 2 * page_bytes());
  CHECK_EQ(KvCache::Create(pool, page_layout(4, 64)).status().code(), Code::kInvalid);
  CHECK_EQ(KvCache::Create(pool, KvLayout{}).status().code(), Code::kInvalid);
}

TEST(hundreds_of_slots_at_128k_tokens_cost_addresses_only) {
  // 32 layers, 8 heads of 128 in bfloat16: 16 GiB of addresses a slot, 4 TiB in all.
  const auto layout = KvLayout::Choose(32, 8, 128, 2, 131072, 256);
  REQUIRE_OK(layout.status());
  const auto pool = make_pool(memory_driver(), size_t{8} << 20, layout.value().chunk_bytes);
  const auto cache = make_cache(pool, layout.value());
  int32_t last = -1;
  for (int i = 0; i < 256; ++i) last = cache->take_slot(131072).value();
  CHECK_EQ(last, 255);
  CHECK_EQ(cache->take_slot(1).status().code(), Code::kOutOfMemory);
  REQUIRE_OK(extend(*cache, {last}, {17}));
  CHECK_EQ(pool->usage().physical, size_t{4} << 20);
  cache->slot_base(last)[layout.value().offset_bytes(31, 1, 7, 31)] = std::byte{1};
  const Status s = extend(*cache, {last}, {131072});
  CHECK_EQ(s.code(), Code::kOutOfMemory);
  CHECK(s.message().find("8190 chunks of 2 MiB") != std::string::npos);
}

TEST(statistics_tell_slots_by_state) {
  Bench b;
  b.request(9);
  REQUIRE_OK(b.cache->release(b.request(20)));
  const KvStats s = b.cache->stats();
  CHECK_EQ(s.active_slots, 1);
  CHECK_EQ(s.available_slots, 1);
  CHECK_EQ(s.free_slots, 2);
  CHECK_EQ(s.broken_slots, 0);
  CHECK_EQ(s.active_bytes, 2 * page_bytes());
  CHECK_EQ(s.available_bytes, 3 * page_bytes());
  CHECK_EQ(s.map_calls, 2u);
  CHECK_EQ(s.unmap_calls, 0u);
}

// Shows a test the moment just before memory is mapped or unmapped.
class WatchedDriver : public FaultyDriver {
 public:
  using FaultyDriver::FaultyDriver;
  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override {
    if (on_map) on_map();
    return FaultyDriver::map(at, handles, n, chunk_bytes);
  }
  Status unmap(std::byte* at, size_t bytes) override {
    if (on_unmap) on_unmap();
    return FaultyDriver::unmap(at, bytes);
  }
  std::function<void()> on_map, on_unmap;
};

TEST(readers_learn_of_memory_after_it_comes_and_before_it_goes) {
  const auto driver = std::make_shared<WatchedDriver>(memory_driver());
  const auto pool = make_pool(driver, 16 * page_bytes());
  const auto cache = make_cache(pool, page_layout(1, 64));
  std::vector<int64_t> seen;
  driver->on_map = driver->on_unmap = [&] { seen.push_back(cache->mapped_tokens(0)); };
  REQUIRE_OK(cache->take_slot(0).status());
  REQUIRE_OK(extend(*cache, {0}, {24}));
  REQUIRE_OK(extend(*cache, {0}, {64}));
  REQUIRE_OK(cache->truncate(0, 56));
  const ChunkId shared = cache->slot_chunks(0)[5];
  REQUIRE_OK(pool->retain(shared));
  REQUIRE_OK(cache->release(0));
  REQUIRE_OK(pool->release(shared));
  REQUIRE_OK(cache->reclaim(page_bytes()).status());
  REQUIRE_OK(cache->close());
  CHECK(seen == (std::vector<int64_t>{0, 24, 56, 40, 32, 0}));
}

TEST(a_call_in_the_middle_of_another_is_refused) {
  const auto driver = std::make_shared<WatchedDriver>(memory_driver());
  const auto cache = make_cache(make_pool(driver, 16 * page_bytes()), page_layout(2, 64));
  const int32_t slot = cache->take_slot(0).value();
  int refused = 0;
  driver->on_map = [&] {
    refused += cache->take_slot(0).status().code() == Code::kInvalid;
    refused += extend(*cache, {slot}, {8}).code() == Code::kInvalid;
    refused += cache->truncate(slot, 0).code() == Code::kInvalid;
    refused += cache->release(slot).code() == Code::kInvalid;
    refused += cache->reclaim(1).status().code() == Code::kInvalid;
    refused += cache->close().code() == Code::kInvalid;
  };
  REQUIRE_OK(extend(*cache, {slot}, {8}));
  CHECK_EQ(refused, 6);
  CHECK_EQ(cache->mapped_tokens(slot), 8);
}

TEST(the_registry_finds_what_lives) {
  const auto pool = make_pool(memory_driver(), 1 << 20);
  auto cache = make_cache(pool, page_layout(2, 16));
  const int32_t id = register_kv(cache);
  CHECK(id > 0);
  CHECK(find_kv(id) == cache);
  const int32_t again = register_kv(cache);
  CHECK(again != id);
  unregister_kv(again);
  unregister_kv(again);
  CHECK(find_kv(again) == nullptr);
  CHECK(find_kv(id) == cache);
  cache.reset();
  CHECK(find_kv(id) == nullptr);
  CHECK(find_kv(0) == nullptr);
  CHECK(find_kv(-5) == nullptr);
  unregister_kv(id);
}

}  // namespace
}  // namespace ellm
