// HostBuffer: rules by hand, random operations against a model, every driver call failing in turn.
#include "memory/host_buffer.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "fixtures.h"

namespace ellm {
namespace {

using Fault = FaultyDriver::Fault;

std::shared_ptr<HostBuffer> make_buffer(std::shared_ptr<Driver> driver, size_t limit_bytes,
                                        size_t block_bytes = page_bytes()) {
  auto buffer = HostBuffer::Create(std::move(driver), block_bytes, limit_bytes);
  REQUIRE_OK(buffer.status());
  return buffer.value();
}

void check_books(const HostUsage& u) {
  CHECK_EQ(u.used + u.free, u.limit);
  CHECK(u.used <= u.physical);
  CHECK(u.physical <= u.limit);
  CHECK(u.used <= u.peak_used);
}

std::byte* address(HostBuffer& buffer, BlockId id) {
  const auto pinned = buffer.pin({id});
  REQUIRE_OK(pinned.status());
  buffer.unpin({id});
  return pinned.value()[0];
}

TEST(block_sizes_that_cannot_be_are_refused) {
  for (const size_t bytes : {size_t{0}, size_t{100}, page_bytes() / 2}) {
    CHECK_EQ(HostBuffer::Create(memory_driver(), bytes, 1 << 20).status().code(), Code::kInvalid);
  }
}

TEST(take_is_all_or_nothing_to_the_byte) {
  const size_t b = 3 * page_bytes();
  const auto buffer = make_buffer(memory_driver(), 4 * b - 1, b);
  std::vector<BlockId> blocks;
  const Status s = buffer->take(4, &blocks);
  CHECK_EQ(s.code(), Code::kOutOfMemory);
  for (const char* part : {"4 host blocks of 12 KiB", "raise the limit"}) {
    CHECK(s.message().find(part) != std::string::npos);
  }
  CHECK(blocks.empty());
  CHECK_EQ(buffer->usage().physical, 0u);
  REQUIRE_OK(buffer->take(3, &blocks));
  CHECK_EQ(buffer->usage().free, b - 1);
  CHECK_EQ(buffer->usage().physical, 3 * b);
  REQUIRE_OK(buffer->resize(4 * b));
  REQUIRE_OK(buffer->take(1, &blocks));
  CHECK_EQ(buffer->usage().free, 0u);
  CHECK_EQ(std::set<BlockId>(blocks.begin(), blocks.end()).size(), 4u);
}

TEST(blocks_hold_data_and_are_kept_for_the_next_take) {
  const size_t b = 2 * page_bytes();
  const auto driver = faulty_driver();
  const auto buffer = make_buffer(driver, 8 * b, b);
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer->take(8, &blocks));
  for (const BlockId id : blocks) std::memset(address(*buffer, id), static_cast<int>(id) + 1, b);
  for (const BlockId id : blocks) {
    CHECK_EQ(static_cast<int>(address(*buffer, id)[b - 1]), static_cast<int>(id) + 1);
  }
  CHECK_OK(buffer->give_back(blocks));
  CHECK_EQ(buffer->usage().physical, 8 * b);
  const uint64_t calls = driver->calls();
  blocks.clear();
  REQUIRE_OK(buffer->take(5, &blocks));
  CHECK_EQ(driver->calls(), calls);
  CHECK_EQ(buffer->trim().value(), 3 * b);
  CHECK_EQ(buffer->usage().physical, 5 * b);
  CHECK_EQ(driver->handle_count(), 5u);
  CHECK_EQ(buffer->usage().peak_used, 8 * b);
}

TEST(blocks_that_are_nobodys_are_refused) {
  const auto buffer = make_buffer(memory_driver(), 4 * page_bytes());
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer->take(3, &blocks));
  CHECK_EQ(buffer->give_back({blocks[0], blocks[0]}).code(), Code::kInvalid);
  CHECK_EQ(buffer->give_back({blocks[0], 77}).code(), Code::kInvalid);
  CHECK_EQ(buffer->pin({blocks[0], 3}).status().code(), Code::kInvalid);
  CHECK_EQ(buffer->usage().used, 3 * page_bytes());
  CHECK_OK(buffer->give_back({blocks[0]}));
  CHECK_EQ(buffer->give_back({blocks[0]}).code(), Code::kInvalid);
}

TEST(pinned_blocks_stay) {
  const auto buffer = make_buffer(memory_driver(), 4 * page_bytes());
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer->take(2, &blocks));
  REQUIRE_OK(buffer->pin({blocks[1]}).status());
  REQUIRE_OK(buffer->pin({blocks[1]}).status());
  CHECK_EQ(buffer->give_back(blocks).code(), Code::kInvalid);
  buffer->unpin({blocks[1]});
  CHECK_EQ(buffer->give_back(blocks).code(), Code::kInvalid);
  CHECK_EQ(buffer->usage().used, 2 * page_bytes());
  buffer->unpin({blocks[1]});
  CHECK_OK(buffer->give_back(blocks));
}

TEST(a_lower_limit_gives_unused_memory_back_and_stops_at_what_is_used) {
  const size_t b = page_bytes();
  const auto driver = faulty_driver();
  const auto buffer = make_buffer(driver, 8 * b);
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer->take(6, &blocks));
  CHECK_OK(buffer->give_back({blocks[1], blocks[4]}));
  CHECK_EQ(buffer->resize(4 * b - 1).code(), Code::kOutOfMemory);
  CHECK_EQ(buffer->usage().limit, 8 * b);
  CHECK_OK(buffer->resize(5 * b - 1));
  CHECK_EQ(buffer->usage().physical, 4 * b);
  CHECK_EQ(driver->handle_count(), 4u);
  CHECK_OK(buffer->resize(20 * b));
  REQUIRE_OK(buffer->take(16, &blocks));
  CHECK_EQ(buffer->usage().free, 0u);
}

// What was asked for with what memory, as simply as can be.
struct Model {
  size_t limit;
  std::map<BlockId, int> taken;  // Their mark.
};

// Does random things; `faults` lets driver calls fail at random.
void random_operations(uint64_t seed, bool faults, int steps) {
  check::seed = seed;
  std::mt19937_64 random(seed);
  const auto below = [&](size_t n) { return random() % n; };
  const size_t b = page_bytes();
  const auto driver = faulty_driver();
  auto buffer = make_buffer(driver, 20 * b + 7);
  Model model{20 * b + 7, {}};
  for (int step = 0; step < steps; ++step) {
    if (faults && below(3) == 0) {
      driver->fail(driver->calls() + 1 + below(4), 1 + below(3),
                   below(2) == 0 ? Fault::kClean : Fault::kHalfDone);
    }
    const uint64_t faults_before = driver->faults();
    const auto as_expected = [&](const Status& s, bool fits) {
      if (s.ok()) return CHECK(fits);
      if (fits) {
        CHECK(driver->faults() > faults_before || s.code() == Code::kBroken);
      } else {
        CHECK_EQ(s.code(), Code::kOutOfMemory);
      }
      return false;
    };
    switch (below(6)) {
      case 0:
      case 1: {
        const size_t n = below(8);
        const bool fits = (model.taken.size() + n) * b <= model.limit;
        std::vector<BlockId> got;
        if (as_expected(buffer->take(n, &got), fits)) CHECK_EQ(got.size(), n);
        for (const BlockId id : got) {
          const int mark = static_cast<int>(below(200));
          CHECK(model.taken.emplace(id, mark).second);
          std::memset(address(*buffer, id), mark, b);
        }
        break;
      }
      case 2: {
        std::vector<BlockId> back;
        for (const auto& [id, mark] : model.taken) {
          if (below(3) == 0) back.push_back(id);
        }
        if (!CHECK_OK(buffer->give_back(back))) break;
        for (const BlockId id : back) model.taken.erase(id);
        break;
      }
      case 3: {
        const size_t limit = below(30 * b);
        if (as_expected(buffer->resize(limit), model.taken.size() * b <= limit)) {
          model.limit = limit;
        }
        break;
      }
      case 4:
        if (as_expected(buffer->trim().status(), true)) {
          CHECK_EQ(buffer->usage().physical, model.taken.size() * b);
        }
        break;
      case 5: {
        const size_t bytes = below(25 * b);
        if (as_expected(buffer->prepare(bytes), true)) {
          CHECK(buffer->usage().physical >= std::min(bytes, model.limit) / b * b);
        }
        break;
      }
    }
    const HostUsage u = buffer->usage();
    check_books(u);
    CHECK_EQ(u.limit, model.limit);
    CHECK_EQ(u.used, model.taken.size() * b);
    CHECK_EQ(u.physical, driver->handle_count() * b);
    for (const auto& [id, mark] : model.taken) {
      const std::byte* at = address(*buffer, id);
      CHECK_EQ(static_cast<int>(at[0]), mark);
      CHECK_EQ(static_cast<int>(at[b - 1]), mark);
    }
  }
  driver->fail(0, 0);
  buffer.reset();
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

TEST(random_operations_match_the_model) {
  const uint64_t seed = check::seed;
  for (uint64_t round = 0; round < 10; ++round) random_operations(seed + round, false, 200);
  check::seed = seed;
}

TEST(random_operations_with_a_failing_driver_match_the_model) {
  const uint64_t seed = check::seed;
  for (uint64_t round = 0; round < 20; ++round) random_operations(seed + round, true, 200);
  check::seed = seed;
}

// Every step is done until it succeeds. False once the n-th call comes after all of them.
bool every_step_with_faults_at(uint64_t n, uint64_t in_a_row, Fault fault) {
  const size_t b = page_bytes();
  const auto driver = faulty_driver();
  driver->fail(n, in_a_row, fault);
  {
    std::shared_ptr<HostBuffer> buffer;
    while (!buffer) {
      auto made = HostBuffer::Create(driver, b, 6 * b);
      if (made.ok()) buffer = made.value();
    }
    const auto until_ok = [&](auto step) {
      for (int attempt = 0; attempt < 5; ++attempt) {
        const size_t used = buffer->usage().used;
        const Status s = step();
        check_books(buffer->usage());
        CHECK_EQ(buffer->usage().physical, driver->handle_count() * b);
        if (s.ok()) return;
        CHECK_EQ(buffer->usage().used, used);
      }
      CHECK(false);
    };
    std::vector<BlockId> blocks;
    until_ok([&] { return buffer->take(4, &blocks); });
    CHECK_OK(buffer->give_back({blocks[0], blocks[2]}));
    until_ok([&] { return buffer->trim().status(); });
    CHECK_EQ(driver->handle_count(), 2u);
    blocks = {blocks[1], blocks[3]};
    until_ok([&] { return buffer->take(3, &blocks); });
    CHECK_OK(buffer->give_back({blocks[0]}));
    until_ok([&] { return buffer->resize(4 * b); });
    until_ok([&] { return buffer->resize(9 * b); });
    until_ok([&] { return buffer->prepare(7 * b); });
    CHECK(driver->handle_count() >= 7u);
    until_ok([&] { return buffer->take(5, &blocks); });
    for (size_t i = 1; i < blocks.size(); ++i) std::memset(address(*buffer, blocks[i]), 1, b);
  }
  if (driver->faults() == 0) return false;
  CHECK_EQ(driver->violations(), "");
  return true;
}

TEST(every_driver_call_may_fail_in_turn) {
  for (const Fault fault : {Fault::kClean, Fault::kHalfDone}) {
    for (const uint64_t in_a_row : {1, 2, 3}) {
      uint64_t n = 1;
      while (every_step_with_faults_at(n, in_a_row, fault)) ++n;
      CHECK(n > 15);
    }
  }
}

TEST(blocks_that_may_still_be_copied_are_lost) {
  const size_t b = page_bytes();
  const auto driver = faulty_driver();
  auto buffer = make_buffer(driver, 4 * b);
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer->take(3, &blocks));
  REQUIRE_OK(buffer->pin({blocks[1]}).status());
  buffer->abandon({blocks[1]});
  CHECK_OK(buffer->give_back(blocks));
  CHECK_EQ(buffer->usage().used, b);
  CHECK_EQ(buffer->trim().value(), 2 * b);
  CHECK_EQ(buffer->resize(0).code(), Code::kOutOfMemory);
  blocks.clear();
  CHECK_EQ(buffer->take(4, &blocks).code(), Code::kOutOfMemory);
  REQUIRE_OK(buffer->take(3, &blocks));
  CHECK_OK(buffer->give_back(blocks));
  buffer.reset();
  CHECK_EQ(driver->leftovers(), "1 ranges, 1 handles, 1 mappings");
  CHECK_EQ(driver->violations(), "");
}

// Counts what is made, each of which takes a millisecond, as pinning does.
class SlowDriver : public FaultyDriver {
 public:
  SlowDriver() : FaultyDriver(memory_driver()) {}
  Status create(size_t bytes, Handle* handle) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ++created;
    return FaultyDriver::create(bytes, handle);
  }
  void await(int count) const {
    while (created < count) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::atomic<int> created{0};
};

TEST(whoever_takes_blocks_goes_before_those_that_are_prepared) {
  constexpr int kBlocks = 1000;
  const size_t b = page_bytes();
  const auto driver = std::make_shared<SlowDriver>();
  auto buffer = make_buffer(driver, kBlocks * b);
  REQUIRE_OK(buffer->prepare_ahead(SIZE_MAX));
  driver->await(1);
  int created_meanwhile = 0;
  for (int i = 0; i < 20; ++i) {
    std::vector<BlockId> blocks;
    driver->await(driver->created + 1);
    const int before = driver->created;
    REQUIRE_OK(buffer->take(1, &blocks));
    created_meanwhile += driver->created - before;
    CHECK_OK(buffer->give_back(blocks));
  }
  CHECK(created_meanwhile < 100);
  buffer->close();
  const int created = driver->created;
  CHECK_EQ(buffer->usage().physical, static_cast<size_t>(created) * b);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK_EQ(driver->created.load(), created);
  buffer.reset();
  CHECK_EQ(driver->leftovers(), "");
}

TEST(preparing_ends_when_it_is_done_or_replaced_or_memory_is_given_back) {
  const size_t b = page_bytes();
  const auto driver = std::make_shared<SlowDriver>();
  auto buffer = make_buffer(driver, 200 * b);
  const auto physical = [&] { return buffer->usage().physical; };
  REQUIRE_OK(buffer->prepare_ahead(3 * b + 1));
  driver->await(3);
  REQUIRE_OK(buffer->prepare_ahead(5 * b));  // It has waited for the thread before.
  driver->await(5);
  buffer->close();
  CHECK_EQ(physical(), 5 * b);
  REQUIRE_OK(buffer->prepare_ahead(SIZE_MAX));
  driver->await(8);
  CHECK(buffer->trim().value() >= 7 * b);
  CHECK_EQ(physical(), 0u);
  std::this_thread::sleep_for(std::chrono::milliseconds(5));
  CHECK_EQ(physical(), 0u);
  // What fails is tried again by whoever needs it.
  driver->fail(driver->calls() + 1, 1);
  REQUIRE_OK(buffer->prepare_ahead(SIZE_MAX));
  while (driver->faults() == 0) std::this_thread::yield();
  buffer->close();
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer->take(2, &blocks));
  CHECK_OK(buffer->give_back(blocks));
  // It ends with the buffer, too.
  REQUIRE_OK(buffer->prepare_ahead(SIZE_MAX));
  buffer.reset();
  CHECK(driver->created < 100);
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

TEST(threads_share_a_buffer) {
  const size_t b = page_bytes();
  const auto driver = faulty_driver();
  auto buffer = make_buffer(driver, 16 * b);
  std::vector<std::thread> threads;
  threads.emplace_back([&] {
    for (int step = 0; step < 100; ++step) {
      CHECK_OK(buffer->prepare_ahead(static_cast<size_t>(step % 12) * b));
      std::this_thread::yield();
    }
  });
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(check::seed + static_cast<uint64_t>(thread));
      std::vector<BlockId> mine;
      for (int step = 0; step < 300; ++step) {
        const size_t before = mine.size();
        const Status s = buffer->take(random() % 5, &mine);
        CHECK(s.ok() || (s.code() == Code::kOutOfMemory && mine.size() == before));
        for (const BlockId id : mine) std::memset(address(*buffer, id), thread, b);
        if (random() % 5 == 0) CHECK_OK(buffer->trim().status());
        if (random() % 5 == 0) {
          const Status resized = buffer->resize((12 + random() % 8) * b);
          CHECK(resized.ok() || resized.code() == Code::kOutOfMemory);
        }
        check_books(buffer->usage());
        for (const BlockId id : mine) {
          CHECK_EQ(static_cast<int>(*address(*buffer, id)), thread);
        }
        if (random() % 2 == 0) {
          CHECK_OK(buffer->give_back(mine));
          mine.clear();
        }
      }
      CHECK_OK(buffer->give_back(mine));
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(buffer->usage().used, 0u);
  buffer.reset();
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

}  // namespace
}  // namespace ellm
