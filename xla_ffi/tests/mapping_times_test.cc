// time_mapping measures every call, and gives everything back.
#include "memory/mapping_times.h"

#include <set>
#include <string>

#include "cuda_gpu.h"
#include "memory/sim_driver.h"

namespace ellm {
namespace {

std::set<std::string> names(const MappingTimes& times) {
  std::set<std::string> all;
  for (const auto& [name, values] : times) all.insert(name);
  return all;
}

const std::set<std::string> kEverywhere = {"create", "destroy",     "map",
                                           "unmap",  "map_batched", "unmap_batched"};

TEST(each_call_is_timed_as_often_as_asked) {
  const auto driver = faulty_driver();
  const auto times = time_mapping(*driver, 2 * page_bytes(), 6, 4);
  REQUIRE_OK(times.status());
  CHECK(names(times.value()) == kEverywhere);
  for (const auto& [name, values] : times.value()) {
    CHECK_EQ(values.size(), 4u);
    for (const double us : values) CHECK(us > 0 && us < 1e6);
  }
  // Reserve, 6 creates, 6 maps and unmaps, a map and an unmap of all, 6 destroys, release.
  CHECK_EQ(driver->calls(), 4u * (1 + 6 + 12 + 2 + 6 + 1));
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

TEST(on_cuda_access_is_timed_apart) {
  Gpu gpu;
  const auto driver = gpu.driver();
  const auto times = time_mapping(*driver, kCudaChunk, 8, 2);
  REQUIRE_OK(times.status());
  std::set<std::string> expected = kEverywhere;
  expected.insert({"set_access", "set_access_batched"});
  CHECK(names(times.value()) == expected);
  CHECK_EQ(gpu.fake.calls_of("cuMemSetAccess"), 2u * (8 + 1));
  CHECK_EQ(gpu.fake.calls_of("cuMemUnmap"), 2u * (8 + 1));
  CHECK_EQ(gpu.fake.used_bytes(0), 0u);
}

TEST(nothing_to_measure_is_refused) {
  const auto driver = faulty_driver();
  CHECK_EQ(time_mapping(*driver, page_bytes(), 0, 1).status().code(), Code::kInvalid);
  CHECK_EQ(time_mapping(*driver, page_bytes(), 1, 0).status().code(), Code::kInvalid);
  CHECK_EQ(time_mapping(*driver, page_bytes() / 2, 1, 1).status().code(), Code::kInvalid);
}

TEST(any_call_may_fail) {
  uint64_t n = 1;
  for (bool met = true; met; ++n) {
    for (const Fault fault : {Fault::kClean, Fault::kHalfDone}) {
      const auto driver = faulty_driver();
      driver->fail(n, 1, fault);
      const auto times = time_mapping(*driver, page_bytes(), 3, 2);
      met = driver->faults() > 0;
      CHECK_EQ(driver->violations(), "");
      // What fails while it is being given back cannot be tried for ever.
      if (times.ok()) CHECK(!met || driver->leftovers() != "");
    }
    REQUIRE(n < 100);
  }
  CHECK(n > 20);
}

TEST(a_simulated_driver_finds_no_broken_rule) {
  SimDriver driver;
  CHECK_OK(time_mapping(driver, 4096, 5, 3).status());
  for (uint64_t n = 1; n < 60; ++n) {
    CHECK_OK(driver.fail_call(n));
    (void)time_mapping(driver, 4096, 5, 2);
  }
}

}  // namespace
}  // namespace ellm
