// A KV cache at work over a driver that fails: every call in turn, then calls at random.
#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fixtures.h"
#include "kv/kv_cache.h"

namespace ellm {
namespace {

using Fault = FaultyDriver::Fault;

constexpr int64_t kSlots = 5;
constexpr int64_t kMaxTokens = 80;  // 10 chunks.
constexpr size_t kPoolChunks = 20;

// A tiny engine: requests that write their mark behind every token, and after every operation look
// at the ledger and at every mark of everybody. What fails is checked to have changed nothing, and
// is then tried again.
class Engine {
 public:
  explicit Engine(std::shared_ptr<FaultyDriver> driver)
      : driver_(std::move(driver)), pool_(make_pool(driver_, kPoolChunks * page_bytes() + 3)) {
    for (;;) {
      auto cache = KvCache::Create(pool_, page_layout(kSlots, kMaxTokens));
      if (cache.ok()) {
        cache_ = cache.value();
        return;
      }
      excused(cache.status());
    }
  }

  // Everything goes, with as many attempts as it takes; nothing may be left.
  ~Engine() {
    until_ok([&] { return cache_->close(); });
    CHECK_EQ(cache_->stats().active_slots, 0);
    check_ledger(*pool_);
    for (const ChunkId id : shared_) CHECK_OK(pool_->release(id));
    CHECK_OK(pool_->return_bytes(Owner::kActivation, plain_));
    CHECK_EQ(pool_->usage().free, pool_->usage().limit);
    until_ok([&] { return pool_->trim(0).status(); });
    cache_.reset();
    pool_.reset();
    CHECK_EQ(driver_->leftovers(), "");
    CHECK_EQ(driver_->violations(), "");
  }

  bool start(int request, int64_t tokens) {
    auto slot = cache_->take_slot(tokens);
    if (!slot.ok()) {
      CHECK_EQ(slot.status().code(), Code::kOutOfMemory);
      CHECK_EQ(requests_.size() + broken_idle(), static_cast<size_t>(kSlots));
      return false;
    }
    for (const auto& [other, r] : requests_) CHECK(r.slot != slot.value());
    requests_[request] = {slot.value(), 0};
    return true;
  }

  // False if there is no memory for it; then nothing has changed.
  bool grow(std::vector<std::pair<int, int64_t>> goals) {
    for (;;) {
      std::vector<int32_t> slots;
      std::vector<int64_t> tokens;
      for (const auto& [request, goal] : goals) {
        slots.push_back(requests_.at(request).slot);
        tokens.push_back(goal);
      }
      const auto before = picture();
      const uint64_t faults = driver_->faults();
      const Status s = extend(*cache_, slots, tokens);
      if (s.ok()) break;
      expect_unchanged_but_broken(before, s);
      if (s.code() == Code::kOutOfMemory && driver_->faults() == faults) {
        check();
        return false;
      }
      if (s.code() != Code::kOutOfMemory) excused(s);
      for (const auto& [request, r] : std::map<int, Request>(requests_)) {
        if (cache_->slot_state(r.slot) == SlotState::kBroken) restart(request);
      }
      const auto gone = [&](const auto& goal) { return requests_.count(goal.first) == 0; };
      goals.erase(std::remove_if(goals.begin(), goals.end(), gone), goals.end());
    }
    for (const auto& [request, goal] : goals) {
      Request& r = requests_.at(request);
      CHECK(cache_->mapped_tokens(r.slot) >= goal);
      for (; r.tokens < goal; ++r.tokens) *mark(r.slot, r.tokens) = mark_of(request, r.tokens);
    }
    check();
    return true;
  }

  void truncate(int request, int64_t tokens) {
    Request& r = requests_.at(request);
    const Status s = cache_->truncate(r.slot, tokens);
    r.tokens = std::min(r.tokens, tokens);
    if (!s.ok()) {
      CHECK_EQ(s.code(), Code::kBroken);
      excused(s);
      restart(request);
    }
    check();
  }

  // Keeps one of the request's chunks for somebody else, as a prefix cache would.
  void share(int request, size_t chunk) {
    const std::vector<ChunkId>& chunks = cache_->slot_chunks(requests_.at(request).slot);
    if (chunk >= chunks.size()) return;
    CHECK_OK(pool_->retain(chunks[chunk]));
    shared_.push_back(chunks[chunk]);
  }
  void unshare() {
    if (shared_.empty()) return;
    CHECK_OK(pool_->release(shared_.back()));
    shared_.pop_back();
  }

  void finish(int request) {
    const int32_t slot = requests_.at(request).slot;
    requests_.erase(request);
    const Status s = cache_->release(slot);
    if (!s.ok()) {
      CHECK_EQ(s.code(), Code::kBroken);
      CHECK_EQ(cache_->slot_state(slot), SlotState::kBroken);
      excused(s);
      CHECK_EQ(cache_->release(slot).code(), Code::kInvalid);
    }
    check();
  }

  void reclaim(size_t bytes) {
    until_ok([&] { return cache_->reclaim(bytes).status(); });
    check();
  }

  void reserve(size_t bytes) {
    for (;;) {
      const Usage before = pool_->usage();
      const Status s = pool_->reserve_bytes(Owner::kActivation, bytes);
      if (s.ok()) plain_ += bytes;
      if (s.ok() || s.code() == Code::kOutOfMemory) break;
      excused(s);
      CHECK_EQ(pool_->usage().activation, before.activation);
      CHECK_EQ(pool_->usage().obtainable, before.obtainable);
    }
    check();
  }
  void give_back() {
    CHECK_OK(pool_->return_bytes(Owner::kActivation, std::exchange(plain_, 0)));
    check();
  }
  void trim(size_t keep) {
    until_ok([&] { return pool_->trim(keep).status(); });
    check();
  }

  const std::map<int, int64_t> tokens() const {
    std::map<int, int64_t> all;
    for (const auto& [request, r] : requests_) all[request] = r.tokens;
    return all;
  }
  size_t idle_broken_slots() const { return broken_idle(); }

 private:
  struct Request {
    int32_t slot;
    int64_t tokens;  // Written.
  };
  using Picture = std::map<int32_t, std::pair<int64_t, std::vector<ChunkId>>>;

  std::byte* mark(int32_t slot, int64_t token) const {
    const KvLayout& l = cache_->layout();
    return cache_->slot_base(slot) + l.offset_bytes(1, 1, 1, token);
  }
  static std::byte mark_of(int request, int64_t token) {
    return static_cast<std::byte>(request * 37 + token * 11 + 1);
  }

  // A failure is one that was commanded, and no two in a row without end.
  void excused(const Status& s) {
    check::report(driver_->faults() > excused_faults_, __FILE__, __LINE__,
                  "failed without a fault: " + s.message());
    REQUIRE(driver_->faults() > excused_faults_);
    excused_faults_ = driver_->faults();
  }
  template <class Operation>
  void until_ok(Operation&& operation) {
    for (Status s = operation(); !s.ok(); s = operation()) excused(s);
  }

  // The request's memory is lost; it begins again from nothing if there is a slot.
  void restart(int request) {
    finish(request);
    start(request, 0);
  }

  size_t broken_idle() const {
    size_t count = 0;
    for (int32_t slot = 0; slot < kSlots; ++slot) {
      bool held = false;
      for (const auto& [request, r] : requests_) held = held || r.slot == slot;
      count += !held && cache_->slot_state(slot) == SlotState::kBroken;
    }
    return count;
  }

  Picture picture() const {
    Picture p;
    for (const auto& [request, r] : requests_) {
      p[r.slot] = {cache_->mapped_tokens(r.slot), cache_->slot_chunks(r.slot)};
    }
    return p;
  }
  void expect_unchanged_but_broken(const Picture& before, const Status& s) {
    for (const auto& [slot, was] : before) {
      if (cache_->slot_state(slot) == SlotState::kBroken) {
        CHECK_EQ(s.code(), Code::kBroken);
        CHECK_EQ(cache_->mapped_tokens(slot), 0);
        continue;
      }
      CHECK_EQ(cache_->mapped_tokens(slot), was.first);
      CHECK(cache_->slot_chunks(slot) == was.second);
    }
  }

  void check() {
    check_ledger(*pool_);
    CHECK_EQ(driver_->violations(), "");
    const KvStats s = cache_->stats();
    CHECK_EQ(pool_->usage().available, s.available_bytes);
    CHECK_EQ(s.active_slots + s.available_slots + s.free_slots + s.broken_slots, kSlots);
    size_t wrong = 0;
    for (const auto& [request, r] : requests_) {
      if (cache_->slot_state(r.slot) == SlotState::kBroken) continue;
      for (int64_t t = 0; t < r.tokens; ++t) wrong += *mark(r.slot, t) != mark_of(request, t);
    }
    CHECK_EQ(wrong, 0u);
  }

  std::shared_ptr<FaultyDriver> driver_;
  std::shared_ptr<ChunkPool> pool_;
  std::shared_ptr<KvCache> cache_;
  std::map<int, Request> requests_;
  std::vector<ChunkId> shared_;
  size_t plain_ = 0;
  uint64_t excused_faults_ = 0;
};

// A bit of everything, under enough pressure that slots are reused and reclaimed. Returns the calls
// of the driver that it took.
uint64_t scenario(const std::shared_ptr<FaultyDriver>& driver) {
  {
    Engine e(driver);
    const auto has = [&](int request) { return e.tokens().count(request) == 1; };
    e.start(1, 20);
    e.start(2, 5);
    e.grow({{1, 20}, {2, 5}});
    e.grow({{1, 50}, {2, 30}});
    if (has(2)) e.finish(2);
    e.start(3, 30);  // Takes the slot of 2 as it is.
    if (has(3)) e.grow({{3, 17}});
    e.start(4, 40);
    if (has(4)) e.grow({{4, 40}});
    if (has(4)) e.truncate(4, 9);
    e.trim(page_bytes());
    e.reserve(3 * page_bytes() + 1);
    if (has(3)) e.share(3, 1);
    if (has(3)) e.finish(3);
    e.give_back();
    if (has(4)) e.finish(4);
    e.start(5, 80);
    if (has(1) && has(5)) e.grow({{5, 80}, {1, 60}});  // Has to take from the dead.
    e.unshare();
    if (has(1)) e.finish(1);
    e.reclaim(2 * page_bytes());
    e.reclaim(kPoolChunks * page_bytes());
    e.reserve(5 * page_bytes());
    e.start(6, 16);
    if (has(6)) e.grow({{6, 16}});
  }
  return driver->calls();
}

TEST(any_call_may_fail) {
  const uint64_t calls = scenario(faulty_driver());
  CHECK(calls > 40);
  uint64_t faults = 0;
  for (const Fault fault : {Fault::kClean, Fault::kHalfDone}) {
    for (const uint64_t in_a_row : {1, 2, 3}) {
      for (uint64_t n = 1; n <= calls && check::failures == 0; ++n) {
        const auto driver = faulty_driver();
        driver->fail(n, in_a_row, fault);
        scenario(driver);
        faults += driver->faults();
        if (check::failures > 0) std::printf("     call %d of %d\n", int(n), int(calls));
      }
    }
  }
  CHECK(faults >= calls * 2 * (1 + 2 + 3) - 12);
}

void random_use(uint64_t seed, bool with_faults, int steps) {
  std::mt19937_64 random(seed);
  const auto below = [&](int64_t n) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(n));
  };
  const auto driver = faulty_driver();
  Engine e(driver);
  int next_request = 1;
  for (int step = 0; step < steps && check::failures == 0; ++step) {
    if (with_faults && below(5) == 0) {
      driver->fail(driver->calls() + 1 + below(4), 1 + below(3),
                   below(2) == 0 ? Fault::kClean : Fault::kHalfDone);
    }
    const std::map<int, int64_t> tokens = e.tokens();
    const auto some = [&] { return *std::next(tokens.begin(), below(tokens.size())); };
    const int64_t choice = tokens.empty() ? 0 : below(16);
    if (choice < 2) {
      e.start(next_request++, below(kMaxTokens + 1));
    } else if (choice < 9) {
      std::vector<std::pair<int, int64_t>> goals;
      for (const auto& [request, now] : tokens) {
        if (below(2) == 0) goals.emplace_back(request, std::min(kMaxTokens, now + below(25)));
      }
      if (!e.grow(goals) && below(2) == 0) e.finish(some().first);
    } else if (choice < 11) {
      e.finish(some().first);
    } else if (choice == 11) {
      const auto [request, now] = some();
      e.truncate(request, below(now + 1));
    } else if (choice == 12) {
      e.reclaim(static_cast<size_t>(below(6)) * page_bytes() / 2);
    } else if (choice == 13) {
      e.reserve(static_cast<size_t>(below(5 * 4096)));
    } else if (choice == 14) {
      below(2) == 0 ? e.give_back() : e.trim(static_cast<size_t>(below(4)) * page_bytes());
    } else {
      below(2) == 0 ? e.share(some().first, static_cast<size_t>(below(5))) : e.unshare();
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
