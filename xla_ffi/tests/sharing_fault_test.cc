// Shared chunks, premap and release_async over a driver that fails: every call in turn, then calls
// at random. After each operation the ledger is compared, to the byte, with what the slots say.
#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "fixtures.h"
#include "kv/kv_cache.h"

namespace ellm {
namespace {

using Fault = FaultyDriver::Fault;

constexpr int64_t kSlots = 5;
constexpr int64_t kMaxTokens = 64;  // 8 chunks.
constexpr size_t kPoolChunks = 16;

// Requests over a KV cache, and a prefix cache that is a set. Each chunk is marked when a request
// first has it, and must carry its mark wherever it is mapped later.
class Sharing {
 public:
  explicit Sharing(std::shared_ptr<FaultyDriver> driver)
      : driver_(std::move(driver)), pool_(make_pool(driver_, kPoolChunks * page_bytes() + 5)) {
    for (;;) {
      auto cache = KvCache::Create(pool_, page_layout(kSlots, kMaxTokens));
      if (cache.ok()) {
        cache_ = cache.value();
        return;
      }
      excused(cache.status());
    }
  }

  ~Sharing() {
    for (Status s = cache_->close(); !s.ok(); s = cache_->close()) excused(s);
    CHECK_EQ(pool_->usage().kv, 0u);
    CHECK_EQ(pool_->usage().available, 0u);
    CHECK_EQ(pool_->usage().cache, cached_.size() * page_bytes());
    uncache(cached_.size());
    CHECK_EQ(pool_->usage().free, pool_->usage().limit);
    for (auto s = pool_->trim(0); !s.ok(); s = pool_->trim(0)) excused(s.status());
    cache_.reset();
    pool_.reset();
    CHECK_EQ(driver_->leftovers(), "");
    CHECK_EQ(driver_->violations(), "");
  }

  bool has(int request) const { return requests_.count(request) == 1; }
  std::vector<int> requests() const {
    std::vector<int> all;
    for (const auto& [request, slot] : requests_) all.push_back(request);
    return all;
  }
  size_t cached() const { return cached_.size(); }

  // A request that begins with the first `n` cached chunks.
  void start(int request, size_t n) {
    for (;;) {
      const uint64_t faults = driver_->faults();
      const auto slot = n > 0 ? cache_->take_empty_slot() : cache_->take_slot(20);
      if (!slot.ok()) {
        if (driver_->faults() == faults) CHECK_EQ(slot.status().code(), Code::kOutOfMemory);
        break;
      }
      for (const auto& [other, taken] : requests_) CHECK(taken != slot.value());
      requests_[request] = slot.value();
      if (n == 0) break;
      const std::vector<ChunkId> ids(cached_.begin(), cached_.begin() + n);
      const Status s = cache_->map_shared(slot.value(), ids);
      if (s.ok()) {
        CHECK(cache_->slot_chunks(slot.value()) == ids);
        break;
      }
      excused(s);
      finish(request);
    }
    check();
  }

  void premap(const std::map<int, int64_t>& goals) {
    const auto [slots, tokens] = arguments(goals);
    const size_t before = pool_->usage().kv;
    const auto taken = cache_->premap(slots.size(), slots.data(), tokens.data());
    REQUIRE_OK(taken.status());
    const size_t after = pool_->usage().kv;
    if (driver_->faults() == 0) CHECK_EQ(after, before + taken.value() * page_bytes());
    check_ledger(*pool_);
  }

  void extend(std::map<int, int64_t> goals) {
    for (;;) {
      const auto [slots, tokens] = arguments(goals);
      const uint64_t faults = driver_->faults();
      const Status s = cache_->extend(slots.size(), slots.data(), tokens.data());
      if (s.ok()) {
        for (size_t i = 0; i < slots.size(); ++i) {
          CHECK(cache_->mapped_tokens(slots[i]) >= tokens[i]);
        }
        break;
      }
      if (s.code() == Code::kOutOfMemory && driver_->faults() == faults) break;
      if (s.code() != Code::kOutOfMemory) excused(s);
      for (const int request : requests()) {
        if (cache_->slot_state(requests_[request]) != SlotState::kBroken) continue;
        finish(request);
        goals.erase(request);
      }
    }
    check();
  }

  // Puts the request's chunks from the beginning into the prefix cache, `n` of them.
  void cache(int request, size_t n) {
    if (!has(request)) return;
    const std::vector<ChunkId>& chunks = cache_->slot_chunks(requests_[request]);
    std::vector<ChunkId> fresh;
    for (size_t i = 0; i < std::min(n, chunks.size()); ++i) {
      const bool known = std::find(cached_.begin(), cached_.end(), chunks[i]) != cached_.end();
      if (!known) fresh.push_back(chunks[i]);
    }
    if (cache_->slot_state(requests_[request]) == SlotState::kBroken) return;
    CHECK_OK(pool_->cache(fresh));
    cached_.insert(cached_.end(), fresh.begin(), fresh.end());
    check();
  }

  // Gives up the last `n`. What comes back is what nobody uses.
  void uncache(size_t n) {
    const std::vector<ChunkId> ids(cached_.end() - n, cached_.end());
    const Usage before = pool_->usage();
    const auto given = pool_->uncache(ids);
    REQUIRE_OK(given.status());
    cached_.resize(cached_.size() - n);
    CHECK_EQ(pool_->usage().cache, before.cache - given.value());
    CHECK(given.value() <= n * page_bytes());
    for (const ChunkId id : ids) marks_.erase(id);
    check_ledger(*pool_);
  }

  void finish(int request) {
    const int32_t slot = requests_.at(request);
    requests_.erase(request);
    const Status s = cache_->release(slot);
    if (!s.ok()) excused(s);
    check();
  }

  // The ledger says at once what it will say in the end, while no call has failed.
  void finish_async(int request) {
    const int32_t slot = requests_.at(request);
    REQUIRE_OK(cache_->release_async(slot));
    requests_.erase(request);
    const Usage now = pool_->usage();
    REQUIRE_OK(cache_->settle());
    const Usage then = pool_->usage();
    if (driver_->faults() == 0) {
      CHECK_EQ(now.kv, then.kv);
      CHECK_EQ(now.cache, then.cache);
      CHECK_EQ(now.free, then.free);
    }
    check();
  }
  // The same without waiting, so that what follows meets a dying slot.
  void finish_async_and_go_on(int request) {
    const int32_t slot = requests_.at(request);
    requests_.erase(request);
    REQUIRE_OK(cache_->release_async(slot));
    check_ledger(*pool_);
  }

  void reclaim(size_t chunks) {
    for (auto s = cache_->reclaim(chunks * page_bytes()); !s.ok();
         s = cache_->reclaim(chunks * page_bytes())) {
      excused(s.status());
    }
    check();
  }

  void check() {
    REQUIRE_OK(cache_->settle());
    std::set<ChunkId> live, dead;
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      const std::vector<ChunkId>& chunks = cache_->slot_chunks(slot);
      const bool broken = cache_->slot_state(slot) == SlotState::kBroken;
      const bool available = cache_->slot_state(slot) == SlotState::kAvailable;
      (available ? dead : live).insert(chunks.begin(), chunks.end());
      if (broken) continue;
      for (size_t i = 0; i < chunks.size(); ++i) check_mark(slot, i, chunks[i]);
    }
    size_t idle = 0;
    for (const ChunkId id : cached_) idle += live.count(id) == 0 && dead.count(id) == 0;
    for (const ChunkId id : dead) CHECK_EQ(live.count(id), 0u);
    const Usage u = pool_->usage();
    CHECK_EQ(u.kv, live.size() * page_bytes());
    CHECK_EQ(u.cache, idle * page_bytes());
    CHECK_EQ(u.available, dead.size() * page_bytes());
    CHECK_EQ(u.free, u.limit - u.kv - u.cache);
    CHECK_EQ(driver_->handle_count() * page_bytes(), u.kv + u.cache + u.available + u.backed_free);
    CHECK_EQ(driver_->violations(), "");
    check_ledger(*pool_);
    // What is gone may come back under a new id with an old mark; nobody may rely on either.
    for (auto it = marks_.begin(); it != marks_.end();) {
      const bool known = live.count(it->first) + dead.count(it->first) > 0 ||
                         std::find(cached_.begin(), cached_.end(), it->first) != cached_.end();
      it = known ? std::next(it) : marks_.erase(it);
    }
  }

 private:
  void check_mark(int32_t slot, size_t i, ChunkId id) {
    auto* at = reinterpret_cast<uint64_t*>(cache_->slot_base(slot) + i * page_bytes());
    if (marks_.emplace(id, id * 0x9e3779b97f4a7c15u).second) *at = marks_[id];
    CHECK_EQ(*at, marks_[id]);
  }

  std::pair<std::vector<int32_t>, std::vector<int64_t>> arguments(
      const std::map<int, int64_t>& goals) const {
    std::vector<int32_t> slots;
    std::vector<int64_t> tokens;
    for (const auto& [request, goal] : goals) {
      if (!has(request)) continue;
      slots.push_back(requests_.at(request));
      tokens.push_back(goal);
    }
    return {slots, tokens};
  }

  // A failure needs a fault that has not been an excuse before, of this or of an earlier operation.
  void excused(const Status& s) {
    check::report(driver_->faults() > excused_faults_, __FILE__, __LINE__,
                  "failed without a fault: " + s.message());
    REQUIRE(driver_->faults() > excused_faults_);
    ++excused_faults_;
  }

  std::shared_ptr<FaultyDriver> driver_;
  std::shared_ptr<ChunkPool> pool_;
  std::shared_ptr<KvCache> cache_;
  std::map<int, int32_t> requests_;  // Slot by request.
  std::vector<ChunkId> cached_;
  std::map<ChunkId, uint64_t> marks_;
  uint64_t excused_faults_ = 0;
};

uint64_t scenario(const std::shared_ptr<FaultyDriver>& driver) {
  {
    Sharing e(driver);
    e.start(1, 0);
    e.premap({{1, 40}});
    e.extend({{1, 40}});
    e.cache(1, 3);
    e.premap({{1, 60}});
    if (e.has(1)) e.finish_async(1);  // With work pending.
    e.start(2, e.cached());
    e.premap({{2, 30}});
    e.start(3, e.cached());
    e.premap({{2, 48}, {3, 33}});
    e.extend({{2, 50}, {3, 40}});
    if (e.has(2)) e.finish_async_and_go_on(2);
    e.extend({{3, 48}});
    e.uncache(std::min<size_t>(1, e.cached()));
    e.start(4, 0);
    e.extend({{4, 64}});  // Has to wait, and to take from the dead.
    if (e.has(3)) e.finish_async_and_go_on(3);
    e.uncache(std::min<size_t>(1, e.cached()));
    e.start(5, 0);
    e.premap({{5, 64}});
    e.cache(4, 2);
    if (e.has(4)) e.finish_async_and_go_on(4);
    e.extend({{5, 64}});
    e.reclaim(3);
    e.start(6, e.cached());
    e.start(7, e.cached());
    e.start(8, e.cached());
    e.extend({{6, 24}, {7, 24}, {8, 24}});
    if (e.has(6)) e.finish(6);
    if (e.has(8)) e.finish_async(8);
    e.start(9, e.cached());  // An empty slot at the price of an available one.
    if (e.has(5)) e.finish_async_and_go_on(5);
    e.premap({{7, 60}});
  }
  return driver->calls();
}

TEST(any_call_may_fail) {
  const uint64_t calls = scenario(faulty_driver());
  CHECK(calls > 50);
  uint64_t faults = 0, runs = 0;
  for (const Fault fault : {Fault::kClean, Fault::kHalfDone}) {
    for (const uint64_t in_a_row : {1, 2, 3}) {
      for (uint64_t n = 1; n <= calls && check::failures == 0; ++n) {
        const auto driver = faulty_driver();
        driver->fail(n, in_a_row, fault);
        scenario(driver);
        faults += driver->faults();
        ++runs;
        if (check::failures > 0) {
          std::printf("     call %d of %d, %d in a row, kind %d\n", int(n), int(calls),
                      int(in_a_row), int(fault));
        }
      }
    }
  }
  CHECK(faults >= runs);
}

void random_use(uint64_t seed, bool with_faults, int steps) {
  std::mt19937_64 random(seed);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const auto driver = faulty_driver();
  Sharing e(driver);
  int next_request = 1;
  for (int step = 0; step < steps && check::failures == 0; ++step) {
    if (with_faults && below(5) == 0) {
      driver->fail(driver->calls() + 1 + below(4), 1 + below(3),
                   below(2) == 0 ? Fault::kClean : Fault::kHalfDone);
    }
    const std::vector<int> all = e.requests();
    const auto some = [&] { return all[below(all.size())]; };
    std::map<int, int64_t> goals;
    for (const int request : all) {
      if (below(2) == 0) goals[request] = static_cast<int64_t>(below(kMaxTokens + 1));
    }
    const size_t choice = all.empty() ? 0 : below(12);
    if (choice < 2) {
      e.start(next_request++, below(std::min<size_t>(e.cached(), 8) + 1));
    } else if (choice < 4) {
      e.premap(goals);
    } else if (choice < 6) {
      e.extend(goals);
    } else if (choice == 6) {
      e.cache(some(), below(4));
    } else if (choice == 7) {
      e.uncache(below(e.cached() + 1));
    } else if (choice == 8) {
      e.finish(some());
    } else if (choice == 9) {
      e.finish_async(some());
    } else if (choice == 10) {
      e.finish_async_and_go_on(some());
    } else {
      e.reclaim(below(5));
    }
  }
}

TEST(random_use) {
  for (uint64_t round = 0; round < 20; ++round) random_use(check::seed + round, false, 300);
}

TEST(random_use_over_a_failing_driver) {
  for (uint64_t round = 0; round < 40; ++round) random_use(check::seed + round, true, 300);
}

}  // namespace
}  // namespace ellm
