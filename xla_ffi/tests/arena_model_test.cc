// Arena: random operations against a model, and every driver call failing in turn.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "arena_fixtures.h"
#include "memory/arena.h"

namespace ellm {
namespace {

using Fault = FaultyDriver::Fault;

// What each chunk position of an arena holds.
struct Model {
  explicit Model(size_t chunks) : owner(chunks, 0) {}
  std::vector<int> owner;                             // The number of the segment, 0 for none.
  std::map<int, std::pair<std::byte*, size_t>> live;  // Address and chunks by number.

  size_t live_chunks() const { return owner.size() - free_chunks(); }
  size_t free_chunks() const { return std::count(owner.begin(), owner.end(), 0); }
  size_t longest_gap() const {
    size_t longest = 0, run = 0;
    for (const int o : owner) longest = std::max(longest, run = o == 0 ? run + 1 : 0);
    return longest;
  }
};

void random_operations(uint64_t seed, bool faults, int steps) {
  check::seed = seed;
  std::mt19937_64 random(seed);
  const auto below = [&](size_t n) { return random() % n; };
  const size_t c = page_bytes();
  constexpr size_t kReserved = 40, kPool = 24;
  const auto driver = faulty_driver();
  auto pool = make_pool(driver, kPool * c);
  auto arena = make_arena(pool, kReserved);
  Model model(kReserved);
  std::byte* base = nullptr;
  size_t others = 0;  // Chunks' worth of bytes that somebody else has.
  int last_number = 0;
  for (int step = 0; step < steps; ++step) {
    if (faults && below(3) == 0) {
      driver->fail(driver->calls() + 1 + below(4), 1 + below(2),
                   below(2) == 0 ? Fault::kClean : Fault::kHalfDone);
    }
    const uint64_t faults_before = driver->faults();
    const ArenaUsage before = arena->usage();
    switch (below(4)) {
      case 0:
      case 1: {
        const size_t bytes = 1 + below(8 * c), n = (bytes + c - 1) / c;
        // The arena's own inactive chunks count as obtainable: it moves them where needed.
        const bool fits = n <= model.longest_gap() && model.live_chunks() + n + others <= kPool;
        const auto at = arena->allocate(bytes);
        if (!at.ok()) {
          CHECK(at.status().code() != Code::kInvalid);
          CHECK(!fits || driver->faults() > faults_before);
          CHECK_EQ(arena->usage().live, before.live);
          break;
        }
        CHECK(fits);
        if (base == nullptr) base = at.value();  // The first one is the lowest.
        const auto begin = static_cast<size_t>(at.value() - base) / c;
        REQUIRE(begin + n <= kReserved);
        ++last_number;
        for (size_t i = begin; i < begin + n; ++i) {
          CHECK_EQ(std::exchange(model.owner[i], last_number), 0);
        }
        model.live[last_number] = {at.value(), n};
        std::memset(at.value(), last_number, n * c);
        break;
      }
      case 2: {
        if (model.live.empty()) break;
        auto it = model.live.begin();
        std::advance(it, below(model.live.size()));
        CHECK_OK(arena->free(it->second.first));
        CHECK_EQ(arena->free(it->second.first).code(), Code::kInvalid);
        std::replace(model.owner.begin(), model.owner.end(), it->first, 0);
        model.live.erase(it);
        CHECK_EQ(arena->usage().mapped, before.mapped);
        break;
      }
      case 3: {
        if (below(3) == 0) {
          CHECK_OK(pool->return_bytes(Owner::kWeights, others * c));
          others = below(8);
          if (!pool->reserve_bytes(Owner::kWeights, others * c).ok()) others = 0;
          break;
        }
        const size_t bytes = below(before.inactive + 2 * c);
        const auto given = arena->collect(bytes);
        if (given.ok()) {
          CHECK_EQ(given.value(), std::min((bytes + c - 1) / c * c, before.inactive));
          CHECK_EQ(arena->usage().mapped, before.mapped - given.value());
        } else {
          CHECK_EQ(given.status().code(), Code::kBroken);
          CHECK(driver->faults() > faults_before);
        }
        break;
      }
    }
    check_books(*arena);
    CHECK_EQ(arena->usage().live, model.live_chunks() * c);
    for (const auto& [number, place] : model.live) {
      for (size_t i = 0; i < place.second; ++i) {
        CHECK_EQ(static_cast<int>(place.first[i * c + c - 1]), number & 0xff);
      }
    }
  }
  driver->fail(0, 0);
  arena.reset();
  CHECK_EQ(pool->usage().activation, 0u);
  CHECK_OK(pool->trim(0).status());
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

TEST(random_operations_match_the_model) {
  const uint64_t seed = check::seed;
  for (uint64_t round = 0; round < 20; ++round) random_operations(seed + round, false, 300);
  check::seed = seed;
}

TEST(random_operations_with_a_failing_driver_match_the_model) {
  const uint64_t seed = check::seed;
  for (uint64_t round = 0; round < 30; ++round) random_operations(seed + round, true, 300);
  check::seed = seed;
}

// Every step is done until it succeeds. False once the n-th call comes after all of them.
bool every_step_with_a_fault_at(uint64_t n, Fault fault) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 6 * c);
  driver->fail(n, 1, fault);
  bool failed_at_the_end = false;
  {
    std::shared_ptr<Arena> arena;
    while (!arena) {
      auto made = Arena::Create(pool, 8 * c);
      if (made.ok()) arena = made.value();
    }
    const auto allocate = [&](size_t chunks) {
      for (int attempt = 0; attempt < 3; ++attempt) {
        const size_t live = arena->usage().live;
        const auto at = arena->allocate(chunks * c);
        check_books(*arena);
        if (at.ok()) {
          std::memset(at.value(), 1, chunks * c);
          return at.value();
        }
        CHECK_EQ(arena->usage().live, live);
      }
      CHECK(false);
      throw check::Abandon();
    };
    const auto collect = [&](size_t bytes) {
      for (int attempt = 0; attempt < 3; ++attempt) {
        const bool ok = arena->collect(bytes).ok();
        check_books(*arena);
        if (ok) return;
      }
      CHECK(false);
    };
    std::byte* a = allocate(2);
    std::byte* b = allocate(1);
    std::byte* d = allocate(2);
    CHECK_OK(arena->free(a));
    collect(c);
    std::byte* e = allocate(2);
    CHECK_OK(arena->free(d));
    CHECK_OK(arena->free(b));
    allocate(4);  // Short by one, with what is inactive counted in.
    CHECK_OK(arena->free(e));
    collect(SIZE_MAX);
    CHECK_EQ(arena->usage().inactive, 0u);
    const uint64_t faults = driver->faults();
    arena.reset();
    failed_at_the_end = driver->faults() > faults;
  }
  driver->fail(0, 0);
  // An arena that could not unmap a chunk at its end leaves it out of everybody's reach.
  if (!failed_at_the_end) {
    CHECK_EQ(pool->usage().activation, 0u);
    CHECK_OK(pool->trim(0).status());
    CHECK_EQ(driver->leftovers(), "");
  }
  CHECK_EQ(driver->violations(), "");
  return driver->faults() > 0;
}

TEST(every_driver_call_may_fail_in_turn) {
  for (const Fault fault : {Fault::kClean, Fault::kHalfDone}) {
    uint64_t n = 1;
    while (every_step_with_a_fault_at(n, fault)) ++n;
    CHECK(n > 15);
  }
}

}  // namespace
}  // namespace ellm
