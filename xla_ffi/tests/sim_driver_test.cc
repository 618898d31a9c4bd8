// SimDriver: its books, its faults, and what it does to callers that break the rules.
#include "memory/sim_driver.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <functional>
#include <memory>
#include <vector>

#include "fixtures.h"

namespace ellm {
namespace {

constexpr size_t kChunk = 4096;

TEST(a_cache_works_without_memory) {
  const auto driver = std::make_shared<SimDriver>();
  const auto pool = make_pool(driver, 10 * kChunk, kChunk);
  KvLayout layout = page_layout(4, 64);
  layout.chunk_bytes = kChunk;
  const auto cache = make_cache(pool, layout);
  const int32_t slot = cache->take_slot(0).value();
  REQUIRE_OK(extend(*cache, {slot}, {64}));
  CHECK_EQ(pool->usage().kv, 8 * kChunk);
  CHECK_EQ(driver->calls(), 1u + 8 + 1);  // reserve, create of each, one map.
  const int32_t other = cache->take_slot(0).value();
  CHECK_EQ(extend(*cache, {other}, {24}).code(), Code::kOutOfMemory);
  REQUIRE_OK(cache->release(slot));
  REQUIRE_OK(extend(*cache, {other}, {24}));
  CHECK_EQ(cache->mapped_tokens(slot), 56);
  CHECK(!readable(cache->slot_base(slot)));
  REQUIRE_OK(cache->close());
  REQUIRE_OK(pool->trim(0).status());
  CHECK_EQ(pool->usage().physical, 0u);
}

TEST(the_nth_call_from_now_fails_and_only_that) {
  SimDriver driver;
  Handle handle = 0;
  REQUIRE_OK(driver.create(kChunk, &handle));
  REQUIRE_OK(driver.fail_call(3));
  CHECK_OK(driver.create(kChunk, &handle));
  CHECK_OK(driver.create(kChunk, &handle));
  const Handle last = handle;
  CHECK_EQ(driver.create(kChunk, &handle).code(), Code::kDriver);
  CHECK_EQ(handle, last);
  CHECK_EQ(driver.calls(), 4u);
  CHECK_OK(driver.create(kChunk, &handle));
  CHECK_EQ(driver.fail_call(0).code(), Code::kInvalid);
}

std::vector<bool> outcomes(uint64_t seed, double rate, int calls) {
  SimDriver driver;
  REQUIRE_OK(driver.inject_faults(seed, rate));
  std::vector<bool> failed;
  for (int i = 0; i < calls; ++i) {
    Handle handle;
    failed.push_back(!driver.create(kChunk, &handle).ok());
  }
  return failed;
}

TEST(faults_follow_the_seed_and_the_rate) {
  CHECK(outcomes(1, 0.5, 200) == outcomes(1, 0.5, 200));
  CHECK(outcomes(1, 0.5, 200) != outcomes(2, 0.5, 200));
  CHECK(outcomes(1, 0, 50) == std::vector<bool>(50, false));
  CHECK(outcomes(1, 1, 50) == std::vector<bool>(50, true));
  int faults = 0;
  for (const bool failed : outcomes(check::seed, 0.1, 20000)) faults += failed;
  CHECK(faults > 1800 && faults < 2200);  // 2000, give or take 4.7 standard deviations.
  SimDriver driver;
  for (const double rate : {-0.1, 1.1, 0.0 / 0.0}) {
    CHECK_EQ(driver.inject_faults(1, rate).code(), Code::kInvalid);
  }
}

TEST(a_failed_call_changes_nothing) {
  SimDriver driver;
  std::byte* base = nullptr;
  Handle handle = 0;
  const auto fails_then_works = [&](const std::function<Status()>& call) {
    REQUIRE_OK(driver.fail_call(1));
    CHECK_EQ(call().code(), Code::kDriver);
    CHECK_OK(call());  // Would end the process if the failed one had done anything.
  };
  fails_then_works([&] { return driver.reserve(4 * kChunk, kChunk, &base); });
  fails_then_works([&] { return driver.create(kChunk, &handle); });
  fails_then_works([&] { return driver.map(base + kChunk, &handle, 1, kChunk); });
  fails_then_works([&] { return driver.unmap(base + kChunk, kChunk); });
  fails_then_works([&] { return driver.destroy(handle, kChunk); });
  fails_then_works([&] { return driver.release(base, 4 * kChunk); });
}

// Whether the call ends the process that makes it.
bool aborts(const std::function<void()>& call) {
  const pid_t child = fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
    call();
    _exit(0);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

TEST(broken_rules_end_the_process) {
  SimDriver driver;
  std::byte* base = nullptr;
  REQUIRE_OK(driver.reserve(8 * kChunk, 4 * kChunk, &base));
  CHECK_EQ(reinterpret_cast<uintptr_t>(base) % (4 * kChunk), 0u);
  Handle h[2];
  for (Handle& handle : h) REQUIRE_OK(driver.create(kChunk, &handle));
  REQUIRE_OK(driver.map(base + kChunk, h, 2, kChunk));
  const Handle none = 99;
  CHECK(!aborts([&] { (void)driver.map(base + 3 * kChunk, h, 2, kChunk); }));
  CHECK(aborts([&] { (void)driver.map(base + 2 * kChunk, h, 1, kChunk); }));
  CHECK(aborts([&] { (void)driver.map(base, h, 2, kChunk); }));
  CHECK(aborts([&] { (void)driver.map(base + 7 * kChunk, h, 2, kChunk); }));
  CHECK(aborts([&] { (void)driver.map(base - kChunk, h, 1, kChunk); }));
  CHECK(aborts([&] { (void)driver.map(base + 4 * kChunk, &none, 1, kChunk); }));
  CHECK(aborts([&] { (void)driver.unmap(base, kChunk); }));
  CHECK(aborts([&] { (void)driver.unmap(base, 2 * kChunk); }));
  CHECK(aborts([&] { (void)driver.unmap(base + 2 * kChunk, 2 * kChunk); }));
  CHECK(aborts([&] { (void)driver.destroy(h[0], kChunk); }));
  CHECK(aborts([&] { (void)driver.destroy(none, kChunk); }));
  CHECK(aborts([&] { (void)driver.release(base, 8 * kChunk); }));
  REQUIRE_OK(driver.unmap(base + kChunk, 2 * kChunk));
  CHECK(aborts([&] { (void)driver.release(base, 4 * kChunk); }));
  CHECK(!aborts([&] { (void)driver.release(base, 8 * kChunk); }));
  CHECK(!aborts([&] { (void)driver.destroy(h[0], kChunk); }));
}

}  // namespace
}  // namespace ellm
