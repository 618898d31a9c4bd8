// The memory core under several threads; meant to be run under TSan too.
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
#include "kv/registry.h"

namespace ellm {
namespace {

void run_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

TEST(threads_share_a_pool) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 20 * c);
  std::atomic<bool> done{false};
  std::thread auditor([&] {
    while (!done) check_ledger(*pool);
  });
  run_threads(3, [&](int thread) {
    std::mt19937_64 random(check::seed + static_cast<uint64_t>(thread));
    std::vector<ChunkId> mine;
    size_t plain = 0;
    for (int step = 0; step < 1500; ++step) {
      switch (random() % 6) {
        case 0:
        case 1: {
          const size_t before = mine.size(), n = random() % 5;
          const Status s = pool->acquire(Owner::kKv, n, &mine);
          CHECK(s.ok() || s.code() == Code::kOutOfMemory);
          CHECK_EQ(mine.size(), before + (s.ok() ? n : 0));
          break;
        }
        case 2:
          for (size_t i = 0; i < 3 && !mine.empty(); ++i) {
            CHECK_OK(pool->release(mine.back()));
            mine.pop_back();
          }
          break;
        case 3: {
          const size_t bytes = random() % (4 * c);
          const Status s = pool->reserve_bytes(Owner::kActivation, bytes);
          CHECK(s.ok() || s.code() == Code::kOutOfMemory);
          if (s.ok()) plain += bytes;
          break;
        }
        case 4:
          CHECK_OK(pool->return_bytes(Owner::kActivation, plain));
          plain = 0;
          break;
        case 5:
          if (random() % 2 == 0) {
            CHECK_OK(pool->trim(random() % (4 * c)).status());
          } else {
            const Status s = pool->set_limit((16 + random() % 8) * c);
            CHECK(s.ok() || s.code() == Code::kOutOfMemory);
          }
          break;
      }
    }
    for (const ChunkId id : mine) CHECK_OK(pool->release(id));
    CHECK_OK(pool->return_bytes(Owner::kActivation, plain));
  });
  done = true;
  auditor.join();
  CHECK_EQ(pool->usage().free, pool->usage().limit);
  CHECK_OK(pool->trim(0).status());
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

// Kernels read mapped_tokens and touch what it promises, while the host thread grows that slot and
// takes, releases and unmaps others.
TEST(readers_touch_what_is_mapped_while_the_host_thread_maps) {
  const auto pool = make_pool(memory_driver(), 64 * page_bytes());
  const auto cache = make_cache(pool, page_layout(8, 256));
  const int32_t slot = cache->take_slot(0).value();
  const KvLayout& l = cache->layout();
  constexpr int kReaders = 2;
  std::atomic<bool> done{false};
  std::thread host([&] {
    std::mt19937_64 random(check::seed);
    for (int64_t tokens = 1; tokens <= 256; ++tokens) {
      const int32_t other = cache->take_slot(random() % 100).value();
      CHECK_OK(extend(*cache, {slot, other}, {tokens, static_cast<int64_t>(random() % 200)}));
      if (random() % 3 == 0) CHECK_OK(cache->truncate(other, 10));
      CHECK_OK(cache->release(other));
      if (random() % 3 == 0) CHECK_OK(cache->reclaim(random() % (8 * page_bytes())).status());
      if (random() % 9 == 0) CHECK_OK(pool->trim(0).status());
    }
    done = true;
  });
  run_threads(kReaders, [&](int reader) {
    // Each reader has a head of its own to write to, so that they do not race with each other.
    std::byte* base = cache->slot_base(slot);
    int64_t written = 0, wrong = 0;
    while (!done || written < 256) {
      const int64_t mapped = cache->mapped_tokens(slot);
      CHECK(mapped >= written);
      for (; written < mapped; ++written) {
        base[l.offset_bytes(1, 1, reader, written)] = static_cast<std::byte>(written + reader);
      }
      for (int64_t t = 0; t < written; ++t) {
        wrong += base[l.offset_bytes(1, 1, reader, t)] != static_cast<std::byte>(t + reader);
      }
      CHECK_EQ(cache->slot_state(slot), SlotState::kActive);
      CHECK_EQ(cache->stats().broken_slots, 0);
    }
    CHECK_EQ(wrong, 0);
  });
  host.join();
  CHECK_OK(cache->close());
  CHECK_EQ(pool->usage().free, pool->usage().limit);
}

TEST(a_second_host_thread_is_refused_and_harms_nothing) {
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 64 * page_bytes());
  auto cache = make_cache(pool, page_layout(8, 64));
  std::atomic<int> served{0};
  run_threads(3, [&](int) {
    for (int i = 0; i < 300; ++i) {
      const auto slot = cache->take_slot(16);
      if (!slot.ok()) {
        CHECK_EQ(slot.status().code(), Code::kInvalid);
        continue;
      }
      const Status s = extend(*cache, {slot.value()}, {40});
      CHECK(s.ok() || s.code() == Code::kInvalid);
      while (!cache->release(slot.value()).ok()) std::this_thread::yield();
      ++served;
    }
  });
  CHECK(served > 0);
  CHECK_EQ(pool->usage().kv, 0u);
  CHECK_OK(cache->close());
  CHECK_OK(pool->trim(0).status());
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

TEST(the_registry_serves_all_threads) {
  const auto pool = make_pool(memory_driver(), 1 << 20);
  run_threads(3, [&](int) {
    for (int i = 0; i < 50; ++i) {
      const auto cache = make_cache(pool, page_layout(2, 16));
      const int32_t id = register_kv(cache);
      CHECK(find_kv(id) == cache);
      CHECK(find_kv(id + 1) != cache);
      unregister_kv(id);
      CHECK(find_kv(id) == nullptr);
    }
  });
}

// Stands in destroy() until it is let go.
class GateDriver : public FaultyDriver {
 public:
  using FaultyDriver::FaultyDriver;
  Status destroy(Handle handle, size_t bytes) override {
    std::unique_lock<std::mutex> lock(mutex_);
    waiting_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
    lock.unlock();
    return FaultyDriver::destroy(handle, bytes);
  }
  void await_visitor() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return waiting_; });
  }
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool waiting_ = false, open_ = false;
};

// While one thread gives memory back, the pool answers others, and one that needs that very memory
// waits for it: it neither fails nor goes above the limit.
void wait_for_memory_being_given_back(const std::function<Status(ChunkPool*)>& need) {
  const size_t c = page_bytes();
  const auto driver = std::make_shared<GateDriver>(memory_driver());
  const auto pool = make_pool(driver, 4 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 4, &ids));
  for (const ChunkId id : ids) REQUIRE_OK(pool->release(id));
  std::thread trimmer([&] { CHECK_OK(pool->trim(0).status()); });
  driver->await_visitor();
  CHECK_EQ(pool->usage().free, 4 * c);
  CHECK_EQ(pool->usage().physical, 4 * c);
  std::atomic<bool> has_it{false};
  std::thread waiter([&] {
    CHECK_OK(need(pool.get()));
    has_it = true;
  });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!has_it);
  driver->open();
  waiter.join();
  trimmer.join();
  check_ledger(*pool);
}

TEST(acquire_waits_for_memory_being_given_back) {
  wait_for_memory_being_given_back([](ChunkPool* pool) {
    std::vector<ChunkId> ids;
    return pool->acquire(Owner::kCache, 4, &ids);
  });
}

TEST(reserve_waits_for_memory_being_given_back) {
  wait_for_memory_being_given_back(
      [](ChunkPool* pool) { return pool->reserve_bytes(Owner::kWeights, 3 * page_bytes()); });
}

TEST(a_lower_limit_waits_for_memory_being_given_back) {
  wait_for_memory_being_given_back([](ChunkPool* pool) { return pool->set_limit(page_bytes()); });
}

}  // namespace
}  // namespace ellm
