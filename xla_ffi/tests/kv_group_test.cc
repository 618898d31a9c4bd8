// Several caches that work for one program: the same slots, and one number for all of them.
#include "fixtures.h"
#include "kv/registry.h"

namespace ellm {
namespace {

TEST(a_slot_is_taken_by_its_number) {
  const auto cache = make_cache(make_pool(host_driver(), 64 * page_bytes()), page_layout(4, 64));
  REQUIRE_OK(cache->take(2));
  CHECK(cache->slot_state(2) == SlotState::kActive);
  CHECK(cache->take(2).code() == Code::kOutOfMemory);
  CHECK(cache->take(4).code() == Code::kInvalid);
  CHECK(cache->take(-1).code() == Code::kInvalid);
  // What is mapped in it stays, also when the cache's thread was about to unmap a part of it.
  REQUIRE_OK(extend(*cache, {2}, {24}));
  const ChunkId shared = cache->slot_chunks(2)[1];
  REQUIRE_OK(cache->pool()->cache({shared}));
  REQUIRE_OK(cache->release_async(2));
  REQUIRE_OK(cache->take(2));
  CHECK_EQ(cache->mapped_tokens(2), 8);
  // Nobody else is given it.
  for (int i = 0; i < 3; ++i) CHECK(cache->take_slot(8).value() != 2);
  CHECK(cache->take_slot(8).status().code() == Code::kOutOfMemory);
  REQUIRE_OK(cache->pool()->uncache({shared}).status());
  REQUIRE_OK(cache->close());
  CHECK(cache->take(0).code() == Code::kInvalid);
}

TEST(a_broken_slot_is_repaired_when_it_is_taken_or_refused) {
  const auto driver = faulty_driver();
  const auto cache = make_cache(make_pool(driver, 64 * page_bytes()), page_layout(2, 64));
  REQUIRE_OK(cache->take(1));
  REQUIRE_OK(extend(*cache, {1}, {24}));
  driver->fail(driver->calls() + 1);
  CHECK(cache->truncate(1, 0).code() == Code::kBroken);
  driver->fail(driver->calls() + 1);
  CHECK(cache->release(1).code() == Code::kBroken);
  driver->fail(driver->calls() + 1);
  CHECK(cache->take(1).code() == Code::kBroken);
  CHECK(cache->slot_state(1) == SlotState::kBroken);
  REQUIRE_OK(cache->take(1));
  CHECK(cache->slot_state(1) == SlotState::kActive);
  CHECK_EQ(cache->mapped_tokens(1), 0);
  CHECK_EQ(cache->pool()->usage().kv, size_t{0});
}

TEST(a_group_stands_for_the_cache_of_each_device) {
  const auto pool = make_pool(host_driver(), 64 * page_bytes());
  const auto one = make_cache(pool, page_layout(1, 64));
  const auto two = make_cache(pool, page_layout(1, 64));
  const int32_t first = register_kv(one), second = register_kv(two);
  const int32_t group = register_kv_group({{0, first}, {3, second}}).value();
  CHECK(find_kv(group, 0) == one);
  CHECK(find_kv(group, 3) == two);
  CHECK(find_kv(group, 1) == nullptr);
  // A cache that is named itself is the same wherever it is asked for.
  CHECK(find_kv(second, 0) == two);
  CHECK(find_kv(second, 7) == two);

  auto arena = Arena::Create(pool, 4 * page_bytes());
  REQUIRE_OK(arena.status());
  use_arena(second, arena.value());
  CHECK(find_arena(group, 3) == arena.value());
  CHECK(find_arena(group, 0) == nullptr);

  unregister_kv(second);
  CHECK(find_kv(group, 3) == nullptr);
  CHECK(find_arena(group, 3) == nullptr);
  CHECK(find_kv(group, 0) == one);
  unregister_kv(group);
  CHECK(find_kv(group, 0) == nullptr);
  CHECK(find_kv(first) == one);
  unregister_kv(first);
}

}  // namespace
}  // namespace ellm
