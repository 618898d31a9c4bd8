// premap, release_async and settle: what waits for the cache's thread, and what does not.
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "fixtures.h"
#include "kv/kv_cache.h"

namespace ellm {
namespace {

// While it is shut, threads other than the one that made it stand before map and unmap.
class GateDriver : public FaultyDriver {
 public:
  using FaultyDriver::FaultyDriver;

  Status map(std::byte* at, const Handle* handles, size_t n, size_t chunk_bytes) override {
    pass();
    return FaultyDriver::map(at, handles, n, chunk_bytes);
  }
  Status unmap(std::byte* at, size_t bytes) override {
    pass();
    return FaultyDriver::unmap(at, bytes);
  }
  void shut() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = false;
    visitors_ = 0;
  }
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // Called where the thread that made it passes.
  std::function<void()> on_host;
  void await_visitor() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return visitors_ > 0; });
  }

 private:
  void pass() {
    if (std::this_thread::get_id() == host_) {
      if (on_host) on_host();
      return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    ++visitors_;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }

  const std::thread::id host_ = std::this_thread::get_id();
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = true;
  int visitors_ = 0;
};

// 4 slots of up to 64 tokens (8 chunks).
struct Bench {
  explicit Bench(size_t pool_chunks = 16)
      : driver(std::make_shared<GateDriver>(memory_driver())),
        pool(make_pool(driver, pool_chunks * page_bytes())),
        cache(make_cache(pool, page_layout(4, 64))) {}
  ~Bench() {
    driver->open();
    CHECK_OK(cache->close());
    check_ledger(*pool);
    CHECK_EQ(pool->usage().free, pool->usage().limit);
    CHECK_OK(pool->trim(0).status());
    CHECK_EQ(driver->leftovers(), "");
    CHECK_EQ(driver->violations(), "");
  }
  int32_t request(int64_t tokens) {
    auto slot = cache->take_empty_slot();
    REQUIRE_OK(slot.status());
    REQUIRE_OK(extend(*cache, {slot.value()}, {tokens}));
    return slot.value();
  }
  size_t premap(const std::vector<int32_t>& slots, const std::vector<int64_t>& tokens) {
    auto taken = cache->premap(slots.size(), slots.data(), tokens.data());
    REQUIRE_OK(taken.status());
    return taken.value();
  }
  // A slot whose first chunk is cached, so that all of it is unmapped when it dies.
  int32_t cached_request(int64_t tokens, ChunkId* cached) {
    const int32_t slot = request(tokens);
    *cached = cache->slot_chunks(slot)[0];
    REQUIRE_OK(pool->cache({*cached}));
    return slot;
  }
  size_t kv() const { return pool->usage().kv / page_bytes(); }

  std::shared_ptr<GateDriver> driver;
  std::shared_ptr<ChunkPool> pool;
  std::shared_ptr<KvCache> cache;
};

// The result of a call that must not be over while the gate is shut.
template <class Call>
auto blocked_until_open(Bench& b, Call&& call) {
  std::atomic<bool> over{false};
  std::atomic<bool> opened{false};
  std::thread opener([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK(!over);
    opened = true;
    b.driver->open();
  });
  auto result = call();
  over = true;
  opener.join();
  CHECK(opened);
  return result;
}

TEST(premapped_chunks_count_at_once_and_are_mapped_behind_the_hosts_back) {
  Bench b;
  const int32_t slot = b.request(8);
  b.driver->shut();
  CHECK_EQ(b.premap({slot}, {32}), 3u);
  CHECK_EQ(b.kv(), 4u);
  b.driver->await_visitor();
  CHECK_EQ(b.cache->mapped_tokens(slot), 8);
  CHECK_EQ(b.premap({slot}, {32}), 0u);  // They are on their way.
  CHECK_EQ(b.premap({slot}, {40}), 1u);
  const uint64_t calls = b.driver->calls();
  CHECK_OK(blocked_until_open(b, [&] { return extend(*b.cache, {slot}, {48}); }));
  CHECK_EQ(b.driver->calls(), calls + 1 + 2 + 2);  // A map, then create and map, twice.
  CHECK_EQ(b.cache->mapped_tokens(slot), 48);
  CHECK_EQ(b.kv(), 6u);
}

TEST(a_slot_at_work_blocks_no_other) {
  Bench b;
  ChunkId cached;
  const int32_t stuck = b.request(8), other = b.request(8), third = b.cached_request(16, &cached);
  b.driver->shut();
  b.premap({stuck, other}, {16, 16});
  REQUIRE_OK(b.cache->release_async(third));
  b.driver->await_visitor();  // The thread is at work on `stuck`, the rest has not begun.
  CHECK_OK(extend(*b.cache, {other}, {24}));  // So the host does it.
  CHECK_EQ(b.cache->mapped_tokens(other), 24);
  CHECK_OK(b.cache->truncate(other, 8));
  CHECK_OK(b.cache->release(other));
  CHECK_OK(b.cache->take_slot(8).status());
  CHECK_EQ(b.cache->slot_state(third), SlotState::kDying);
  CHECK_EQ(b.cache->mapped_tokens(stuck), 8);
  b.driver->open();
  REQUIRE_OK(b.cache->settle());
  CHECK_EQ(b.cache->mapped_tokens(stuck), 16);
  CHECK_EQ(b.cache->slot_state(third), SlotState::kFree);
  CHECK_EQ(b.pool->uncache({cached}).value(), page_bytes());
}

TEST(two_threads_never_work_on_one_slot) {
  Bench b;
  const int32_t stuck = b.request(8), slot = b.request(8);
  b.driver->shut();
  b.premap({stuck}, {16});
  b.driver->await_visitor();
  b.premap({slot}, {24});
  b.premap({slot}, {40});
  b.driver->on_host = [&] {  // The host does the first premap; now the thread is free for another.
    b.driver->open();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    CHECK_EQ(b.cache->mapped_tokens(stuck), 16);
  };
  CHECK_OK(extend(*b.cache, {slot}, {40}));
  b.driver->on_host = nullptr;
  CHECK_EQ(b.cache->mapped_tokens(slot), 40);
  CHECK_EQ(b.driver->violations(), "");
}

TEST(premap_takes_what_there_is_in_order) {
  Bench b(10);
  const int32_t one = b.request(8), two = b.request(8), three = b.request(8), dead = b.request(24);
  REQUIRE_OK(b.cache->release(dead));
  CHECK_EQ(b.premap({two, one, three}, {24, 32, 16}), 4u);  // 2, then 2 of 3; nothing reclaimed.
  REQUIRE_OK(b.cache->settle());
  CHECK_EQ(b.cache->mapped_tokens(two), 24);
  CHECK_EQ(b.cache->mapped_tokens(one), 24);
  CHECK_EQ(b.cache->mapped_tokens(three), 8);
  CHECK_EQ(b.cache->mapped_tokens(dead), 24);
  REQUIRE_OK(extend(*b.cache, {two, one, three}, {24, 32, 16}));
  CHECK_EQ(b.cache->mapped_tokens(dead), 8);
}

TEST(a_premap_that_failed_is_tried_again_by_extend) {
  Bench b;
  const int32_t slot = b.request(8);
  for (const uint64_t call : {1, 2, 3}) {  // create, create, map.
    CHECK_OK(b.pool->trim(0).status());
    b.driver->fail(b.driver->calls() + call);
    CHECK_EQ(b.premap({slot}, {24}), 2u);
    REQUIRE_OK(b.cache->settle());
    CHECK_EQ(b.kv(), 1u);
    CHECK_EQ(b.cache->slot_state(slot), SlotState::kActive);
    CHECK_EQ(b.cache->mapped_tokens(slot), 8);
    REQUIRE_OK(extend(*b.cache, {slot}, {24}));
    REQUIRE_OK(b.cache->truncate(slot, 8));
  }
  CHECK_OK(b.pool->trim(0).status());
  b.driver->fail(b.driver->calls() + 1, 2);
  b.premap({slot}, {16});
  CHECK_EQ(extend(*b.cache, {slot}, {16}).code(), Code::kDriver);
  CHECK_OK(b.pool->trim(0).status());
  b.driver->fail(b.driver->calls() + 2, 1, FaultyDriver::Fault::kHalfDone);
  b.premap({slot}, {16});
  CHECK_EQ(extend(*b.cache, {slot}, {16}).code(), Code::kBroken);
  CHECK_EQ(b.cache->slot_state(slot), SlotState::kBroken);
  CHECK_EQ(b.premap({slot}, {64}), 0u);
  REQUIRE_OK(b.cache->release_async(slot));
  REQUIRE_OK(b.cache->settle());
  CHECK_EQ(b.cache->slot_state(slot), SlotState::kFree);
}

TEST(a_dying_slot_is_accounted_for_at_once_and_taken_later) {
  Bench b;
  const int32_t slot = b.request(40);
  const std::vector<ChunkId> chunks = b.cache->slot_chunks(slot);
  REQUIRE_OK(b.pool->cache({chunks[1], chunks[2]}));
  b.driver->shut();
  REQUIRE_OK(b.cache->release_async(slot));
  b.driver->await_visitor();
  CHECK_EQ(b.cache->slot_state(slot), SlotState::kDying);
  CHECK_EQ(b.cache->mapped_tokens(slot), 8);
  CHECK_EQ(b.pool->usage().kv, 0u);
  CHECK_EQ(b.pool->usage().cache, 2 * page_bytes());
  CHECK_EQ(b.pool->usage().available, 3 * page_bytes());
  CHECK_EQ(b.cache->stats().available_bytes, page_bytes());
  CHECK_EQ(b.cache->stats().dying_bytes, 2 * page_bytes());
  CHECK_EQ(b.cache->stats().dying_slots, 1);
  CHECK_EQ(b.pool->uncache({chunks[2]}).value(), page_bytes());
  CHECK_EQ(b.pool->usage().available, 4 * page_bytes());
  CHECK_EQ(b.cache->release(slot).code(), Code::kInvalid);
  for (int i = 0; i < 3; ++i) CHECK(b.cache->take_slot(8).value() != slot);
  CHECK_EQ(blocked_until_open(b, [&] { return b.cache->take_slot(8); }).value(), slot);
  CHECK_EQ(b.cache->mapped_tokens(slot), 8);
  CHECK_EQ(b.kv(), 1u);
  CHECK_EQ(b.pool->uncache({chunks[1]}).value(), page_bytes());
}

TEST(a_slot_with_nothing_to_unmap_does_not_die) {
  Bench b;
  const int32_t slot = b.request(40);
  b.driver->shut();
  REQUIRE_OK(b.cache->release_async(slot));
  CHECK_EQ(b.cache->slot_state(slot), SlotState::kAvailable);
  CHECK_EQ(b.cache->take_slot(40).value(), slot);
}

TEST(whoever_is_short_of_memory_waits_for_dying_slots) {
  for (int who = 0; who < 5; ++who) {
    Bench b(8);
    ChunkId cached;
    const int32_t dying = b.cached_request(56, &cached), active = b.request(8);
    b.driver->shut();
    REQUIRE_OK(b.cache->release_async(dying));
    b.driver->await_visitor();
    CHECK_OK(blocked_until_open(b, [&]() -> Status {
      switch (who) {
        case 0:
          return extend(*b.cache, {active}, {48});
        case 1:
          return b.pool->reserve_bytes(Owner::kActivation, 6 * page_bytes());
        case 2:
          return b.pool->set_limit(2 * page_bytes());
        case 3: {
          const auto given = b.cache->reclaim(2 * page_bytes());
          CHECK_EQ(given.value(), 6 * page_bytes());
          return given.status();
        }
        default: {
          std::vector<ChunkId> ids;
          Status s = b.pool->acquire(Owner::kActivation, 6, &ids);
          CHECK_OK(b.pool->release(ids));
          return s;
        }
      }
    }));
    if (who == 1) CHECK_OK(b.pool->return_bytes(Owner::kActivation, 6 * page_bytes()));
    CHECK_OK(b.pool->uncache({cached}).status());
  }
}

TEST(a_failure_to_unmap_a_dying_slot_shows_as_a_broken_slot) {
  Bench b(8);
  ChunkId cached;
  const int32_t dying = b.cached_request(56, &cached), active = b.request(8);
  b.driver->fail(b.driver->calls() + 1);
  REQUIRE_OK(b.cache->release_async(dying));
  REQUIRE_OK(b.cache->settle());
  CHECK_EQ(b.cache->slot_state(dying), SlotState::kBroken);
  CHECK_EQ(b.kv(), 8u);  // Out of reach.
  CHECK_EQ(b.pool->uncache({cached}).value(), 0u);
  CHECK_EQ(extend(*b.cache, {active}, {16}).code(), Code::kOutOfMemory);
  CHECK_EQ(b.cache->reclaim(page_bytes()).value(), 7 * page_bytes());
  CHECK_EQ(b.cache->slot_state(dying), SlotState::kFree);
}

TEST(an_empty_slot_costs_no_more_than_the_smallest_available_one) {
  Bench b;
  const int32_t one = b.request(8), two = b.request(16), three = b.request(24);
  for (const int32_t slot : {three, two, one}) REQUIRE_OK(b.cache->release(slot));
  CHECK_EQ(b.cache->take_empty_slot().value(), 3);
  CHECK_EQ(b.cache->take_empty_slot().value(), one);
  CHECK_EQ(b.cache->mapped_tokens(one), 0);
  b.driver->fail(b.driver->calls() + 1);
  CHECK_EQ(b.cache->take_empty_slot().value(), three);  // Unmapping `two` fails.
  CHECK_EQ(b.cache->slot_state(two), SlotState::kBroken);
  CHECK_EQ(b.kv(), 2u);
  CHECK_EQ(b.cache->take_empty_slot().status().code(), Code::kOutOfMemory);
  ChunkId cached;
  REQUIRE_OK(extend(*b.cache, {three}, {16}));
  cached = b.cache->slot_chunks(three)[0];
  REQUIRE_OK(b.pool->cache({cached}));
  b.driver->shut();
  REQUIRE_OK(b.cache->release_async(three));
  b.driver->await_visitor();
  CHECK_EQ(blocked_until_open(b, [&] { return b.cache->take_empty_slot(); }).value(), three);
  CHECK_OK(b.pool->uncache({cached}).status());
}

TEST(a_cache_may_be_closed_with_work_pending) {
  Bench b;
  ChunkId cached;
  const int32_t slot = b.request(8), dying = b.cached_request(16, &cached);
  b.driver->shut();
  b.premap({slot}, {64});
  REQUIRE_OK(b.cache->release_async(dying));
  b.driver->await_visitor();
  CHECK_OK(blocked_until_open(b, [&] { return b.cache->close(); }));
  CHECK_EQ(b.cache->settle().code(), Code::kInvalid);
  CHECK_EQ(b.cache->premap(0, nullptr, nullptr).status().code(), Code::kInvalid);
  CHECK_EQ(b.cache->release_async(slot).code(), Code::kInvalid);
  CHECK_OK(b.pool->uncache({cached}).status());
}

TEST(shared_chunks_are_mapped_into_empty_slots_only) {
  Bench b;
  const int32_t from = b.request(24), full = b.request(8);
  const std::vector<ChunkId> chunks = b.cache->slot_chunks(from);
  const int32_t to = b.cache->take_empty_slot().value();
  CHECK_EQ(b.cache->map_shared(full, chunks).code(), Code::kInvalid);
  CHECK_EQ(b.cache->map_shared(3, chunks).code(), Code::kInvalid);
  CHECK_EQ(b.cache->map_shared(to, {chunks[0], ChunkId{77}}).code(), Code::kInvalid);
  CHECK_EQ(b.cache->map_shared(to, std::vector<ChunkId>(9, chunks[0])).code(), Code::kInvalid);
  CHECK_EQ(b.kv(), 4u);
  REQUIRE_OK(b.cache->map_shared(to, {chunks[0], chunks[1]}));
  CHECK_EQ(b.kv(), 4u);
  CHECK_EQ(b.cache->mapped_tokens(to), 16);
  *b.cache->slot_base(from) = std::byte{99};
  CHECK(*b.cache->slot_base(to) == std::byte{99});
  REQUIRE_OK(extend(*b.cache, {to}, {24}));
  CHECK_EQ(b.kv(), 5u);
  REQUIRE_OK(b.cache->release(from));  // Nothing of it stays: `to` has its beginning.
  CHECK_EQ(b.cache->slot_state(from), SlotState::kFree);
  CHECK_EQ(b.kv(), 4u);
  CHECK(*b.cache->slot_base(to) == std::byte{99});
}

TEST(arguments_of_premap_are_checked_before_anything_is_taken) {
  Bench b;
  const int32_t slot = b.request(8);
  for (const int64_t tokens : {int64_t{-1}, int64_t{65}, INT64_MAX}) {
    const int32_t slots[] = {slot, slot};
    const int64_t both[] = {64, tokens};
    CHECK_EQ(b.cache->premap(2, slots, both).status().code(), Code::kInvalid);
  }
  for (const int32_t bad : {-1, 3, 4}) {
    const int32_t slots[] = {slot, bad};
    const int64_t both[] = {64, 8};
    CHECK_EQ(b.cache->premap(2, slots, both).status().code(), Code::kInvalid);
    CHECK_EQ(b.cache->release_async(bad).code(), Code::kInvalid);
  }
  CHECK_EQ(b.kv(), 1u);
}

// Kernels read mapped_tokens and touch what it promises while slots grow behind the host's back.
TEST(readers_touch_what_is_mapped_while_the_cache_maps) {
  const auto pool = make_pool(memory_driver(), 64 * page_bytes());
  const auto cache = make_cache(pool, page_layout(8, 256));
  const KvLayout& l = cache->layout();
  const int32_t slot = cache->take_slot(0).value();
  std::atomic<bool> done{false};
  std::thread reader([&] {
    std::byte* base = cache->slot_base(slot);
    int64_t written = 0, wrong = 0;
    while (!done || written < 256) {
      for (const int64_t mapped = cache->mapped_tokens(slot); written < mapped; ++written) {
        base[l.offset_bytes(1, 1, 0, written)] = static_cast<std::byte>(written);
      }
      for (int64_t t = 0; t < written; ++t) {
        wrong += base[l.offset_bytes(1, 1, 0, t)] != static_cast<std::byte>(t);
      }
      const KvStats s = cache->stats();
      CHECK_EQ(s.active_slots + s.available_slots + s.free_slots + s.dying_slots, 8);
      check_ledger(*pool);
    }
    CHECK_EQ(wrong, 0);
  });
  std::mt19937_64 random(check::seed);
  std::vector<ChunkId> cached;
  for (int64_t tokens = 1; tokens <= 256; ++tokens) {
    const auto other = cache->take_empty_slot();
    REQUIRE_OK(other.status());
    if (!cached.empty()) CHECK_OK(cache->map_shared(other.value(), cached));
    const int32_t slots[] = {slot, other.value()};
    const int64_t goals[] = {tokens, static_cast<int64_t>(random() % 200)};
    CHECK_OK(cache->premap(2, slots, goals).status());
    if (random() % 4 != 0) CHECK_OK(cache->extend(2, slots, goals));
    const std::vector<ChunkId> chunks = cache->slot_chunks(other.value());
    if (cached.empty() && !chunks.empty()) {
      cached = {chunks[0]};
      CHECK_OK(pool->cache(cached));
    } else if (!cached.empty() && random() % 4 == 0) {
      CHECK_OK(pool->uncache(cached).status());
      cached.clear();
    }
    CHECK_OK(cache->release_async(other.value()));
    if (random() % 9 == 0) CHECK_OK(cache->reclaim(random() % (8 * page_bytes())).status());
    if (random() % 9 == 0) CHECK_OK(pool->trim(0).status());
  }
  REQUIRE_OK(extend(*cache, {slot}, {256}));
  done = true;
  reader.join();
  CHECK_OK(cache->close());
  if (!cached.empty()) CHECK_OK(pool->uncache(cached).status());
  CHECK_EQ(pool->usage().free, pool->usage().limit);
}

}  // namespace
}  // namespace ellm
