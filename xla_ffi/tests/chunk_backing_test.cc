// ChunkPool::back_ahead: memory that is made before it is asked for, and never above the limit.
#include <atomic>
#include <chrono>
#include <random>
#include <thread>
#include <vector>

#include "fixtures.h"
#include "memory/chunk_pool.h"

namespace ellm {
namespace {

// Knows how much memory there is at once, and was at most.
class CountingDriver : public FaultyDriver {
 public:
  using FaultyDriver::FaultyDriver;

  Status create(size_t bytes, Handle* handle) override {
    // Counted before it is there and until it is gone, as the pool has to.
    const size_t now = bytes_ += bytes;
    size_t most = most_bytes_;
    while (now > most && !most_bytes_.compare_exchange_weak(most, now)) {
    }
    Status s = FaultyDriver::create(bytes, handle);
    if (!s.ok()) bytes_ -= bytes;
    return s;
  }
  Status destroy(Handle handle, size_t bytes) override {
    Status s = FaultyDriver::destroy(handle, bytes);
    if (s.ok()) bytes_ -= bytes;
    return s;
  }
  size_t most_bytes() const { return most_bytes_; }

 private:
  std::atomic<size_t> bytes_{0}, most_bytes_{0};
};

// Waits until it is so; false if that takes for ever.
template <class Condition>
bool becomes_true(Condition&& condition) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > deadline) return false;
    std::this_thread::yield();
  }
  return true;
}

struct Pool {
  explicit Pool(size_t limit_chunks)
      : driver(std::make_shared<CountingDriver>(memory_driver())),
        pool(make_pool(driver, limit_chunks * page_bytes() + 9)) {}

  size_t backed() const { return pool->usage().backed_free / page_bytes(); }
  bool comes_to(size_t chunks) const {
    return becomes_true([&] { return backed() == chunks; });
  }
  // Nothing is made for a while.
  bool rests() const {
    const uint64_t calls = driver->calls();
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    return driver->calls() == calls;
  }

  std::shared_ptr<CountingDriver> driver;
  std::shared_ptr<ChunkPool> pool;
};

TEST(memory_is_made_ahead_as_far_as_asked) {
  Pool p(20);
  p.pool->back_ahead(5 * page_bytes() + 1);
  CHECK(p.comes_to(5));
  CHECK_EQ(p.pool->usage().free, p.pool->usage().limit);
  CHECK_EQ(p.pool->usage().physical, 5 * page_bytes());
  CHECK(p.rests());
  // What is taken is replaced.
  std::vector<ChunkId> ids;
  REQUIRE_OK(p.pool->acquire(Owner::kKv, 3, &ids));
  CHECK(p.comes_to(5));
  CHECK_EQ(p.pool->usage().create_calls, 8u);
  check_ledger(*p.pool);
  // Not when there is enough, nor after the end.
  p.pool->back_ahead(2 * page_bytes());
  p.pool->back_ahead(0);
  ids.clear();
  REQUIRE_OK(p.pool->acquire(Owner::kKv, 4, &ids));
  CHECK(p.rests());
  CHECK_EQ(p.backed(), 1u);
}

TEST(it_stops_at_the_limit) {
  Pool p(6);
  REQUIRE_OK(p.pool->reserve_bytes(Owner::kWeights, 2 * page_bytes()));
  p.pool->back_ahead(100 * page_bytes());
  CHECK(p.comes_to(4));
  CHECK(p.rests());
  // Plain bytes take it away, and it is not made again for as long as nobody takes chunks.
  REQUIRE_OK(p.pool->reserve_bytes(Owner::kActivation, 3 * page_bytes()));
  CHECK_EQ(p.backed(), 1u);
  CHECK_OK(p.pool->return_bytes(Owner::kActivation, 3 * page_bytes()));
  CHECK(p.rests());
  CHECK_EQ(p.backed(), 1u);
  std::vector<ChunkId> ids;
  REQUIRE_OK(p.pool->acquire(Owner::kKv, 1, &ids));
  CHECK(p.comes_to(3));
  check_ledger(*p.pool);
  CHECK(p.driver->most_bytes() <= 4 * page_bytes());
}

TEST(what_is_trimmed_stays_away_until_chunks_are_taken) {
  Pool p(12);
  p.pool->back_ahead(6 * page_bytes());
  CHECK(p.comes_to(6));
  CHECK_EQ(p.pool->trim(2 * page_bytes()).value(), 4 * page_bytes());
  CHECK(p.rests());
  CHECK_EQ(p.backed(), 2u);
  REQUIRE_OK(p.pool->set_limit(1 * page_bytes()));
  CHECK(p.rests());
  CHECK_EQ(p.backed(), 1u);
  REQUIRE_OK(p.pool->set_limit(12 * page_bytes()));
  std::vector<ChunkId> ids;
  REQUIRE_OK(p.pool->acquire(Owner::kKv, 2, &ids));
  CHECK(p.comes_to(6));
}

TEST(a_refusal_ends_it_until_chunks_are_taken) {
  Pool p(12);
  p.driver->fail(3, 1000);
  p.pool->back_ahead(8 * page_bytes());
  CHECK(becomes_true([&] { return p.driver->faults() == 1; }));
  CHECK(p.rests());
  CHECK_EQ(p.backed(), 2u);
  p.driver->fail(0, 0);
  std::vector<ChunkId> ids;
  REQUIRE_OK(p.pool->acquire(Owner::kKv, 1, &ids));
  CHECK(p.comes_to(8));
  check_ledger(*p.pool);
}

TEST(a_pool_may_end_while_memory_is_made) {
  for (int round = 0; round < 50; ++round) {
    Pool p(200);
    p.pool->back_ahead(200 * page_bytes());
    if (round % 2 == 0) (void)becomes_true([&] { return p.backed() > 3; });
    p.pool.reset();
    CHECK_EQ(p.driver->leftovers(), "");
  }
}

TEST(threads_take_and_give_while_memory_is_made_ahead) {
  Pool p(32);
  p.pool->back_ahead(10 * page_bytes());
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(check::seed + static_cast<uint64_t>(thread));
      std::vector<ChunkId> ids;
      size_t plain = 0;
      for (int step = 0; step < 400; ++step) {
        switch (random() % 6) {
          case 0:
          case 1: {
            const Status s = p.pool->acquire(Owner::kKv, random() % 6, &ids);
            CHECK(s.ok() || s.code() == Code::kOutOfMemory);
            break;
          }
          case 2:
            CHECK_OK(p.pool->release(ids));
            ids.clear();
            break;
          case 3: {
            const size_t bytes = random() % (8 * page_bytes());
            const Status s = p.pool->reserve_bytes(Owner::kActivation, bytes);
            CHECK(s.ok() || s.code() == Code::kOutOfMemory);
            if (s.ok()) plain += bytes;
            break;
          }
          case 4:
            CHECK_OK(p.pool->return_bytes(Owner::kActivation, plain));
            plain = 0;
            break;
          case 5:
            if (random() % 4 == 0) CHECK_OK(p.pool->trim(random() % 4 * page_bytes()).status());
            if (random() % 4 == 0) p.pool->back_ahead(random() % 12 * page_bytes());
            break;
        }
        check_ledger(*p.pool);
      }
      CHECK_OK(p.pool->release(ids));
      CHECK_OK(p.pool->return_bytes(Owner::kActivation, plain));
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(p.driver->most_bytes() <= 32 * page_bytes() + 9);
  CHECK_EQ(p.pool->usage().free, p.pool->usage().limit);
  p.pool.reset();
  CHECK_EQ(p.driver->leftovers(), "");
  CHECK_EQ(p.driver->violations(), "");
}

}  // namespace
}  // namespace ellm
