// The CUDA driver's functions: found or not, and their errors in words.
#include "memory/cuda_api.h"

#include <string>

#include "cuda_gpu.h"
#include "memory/devices.h"

namespace ellm {
namespace {

TEST(a_machine_without_a_driver_is_told_so) {
  const Status s = load_cuda_library("libno-such-driver.so.1").status();
  CHECK_EQ(s.code(), Code::kDriver);
  for (const char* part : {"no CUDA driver", "libno-such-driver.so.1", "device=\"cpu\""}) {
    CHECK(says(s, part));
  }
}

TEST(a_library_without_the_functions_is_no_driver) {
  const Status s = load_cuda_library("libm.so.6").status();
  CHECK_EQ(s.code(), Code::kDriver);
  CHECK(says(s, "libm.so.6 has no function cuInit"));
}

TEST(the_driver_of_this_machine_is_looked_for_once) {
  const auto first = load_cuda(), second = load_cuda();
  CHECK_EQ(first.ok(), second.ok());
  CHECK_EQ(first.status().message(), second.status().message());
  if (first.ok()) {
    CHECK(first.value() == second.value());
    return;
  }
  CHECK(says(first.status(), "device=\"cpu\""));
  for (const auto& status : {open_device_memory("cuda:0").status(),
                             open_host_memory("cuda:0").status(), open_link("cuda:0").status()}) {
    CHECK_EQ(status.message(), first.status().message());
  }
}

TEST(errors_are_told_in_the_words_of_the_driver) {
  Gpu gpu;
  const Status known = cuda_error(gpu.fake.api(), cu::kOutOfMemory, "cannot take 2 MiB");
  CHECK_EQ(known.code(), Code::kDriver);
  for (const char* part :
       {"cannot take 2 MiB: CUDA_ERROR_OUT_OF_MEMORY (out of memory)", "lower device_memory"}) {
    CHECK(says(known, part));
  }
  CHECK(says(cuda_error(gpu.fake.api(), 4711, "cannot"), "error 4711 of the CUDA driver"));
  for (const int fatal : {214, 700, 702, 710, 714, 715, 716, 717, 718, 719}) {
    CHECK(says(cuda_error(gpu.fake.api(), fatal, "cannot"), "start it anew"));
  }
  for (const int harmless : {1, 2, 201, 701, 704, 712, 713, 720, 900, 999}) {
    CHECK(!says(cuda_error(gpu.fake.api(), harmless, "cannot"), "start it anew"));
  }
}

TEST(devices_have_names) {
  CHECK(!parse_device("cpu").value().is_cuda);
  for (const int ordinal : {0, 3, 12}) {
    const auto parsed = parse_device("cuda:" + std::to_string(ordinal));
    REQUIRE(parsed.ok());
    CHECK(parsed.value().is_cuda);
    CHECK_EQ(parsed.value().ordinal, ordinal);
  }
  for (const char* wrong :
       {"", "gpu", "cuda", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "CPU", "cuda:99999999999"}) {
    CHECK_EQ(parse_device(wrong).status().code(), Code::kInvalid);
  }
  for (const auto& status : {open_device_memory("gpu").status(), open_host_memory("gpu").status(),
                             open_link("gpu").status()}) {
    CHECK(says(status, "there is no device \"gpu\"; use \"cpu\""));
  }
  CHECK(open_device_memory("cpu").ok());
  CHECK(open_host_memory("cpu").ok());
  CHECK(open_link("cpu").ok());
}

TEST(devices_are_listed_with_their_memory) {
  Gpu gpu({2 * kMiB, 64 * kMiB, 2});
  const auto driver = gpu.driver(1);
  Handle handle;
  REQUIRE_OK(driver->create(6 * kMiB, &handle));
  const auto infos = list_cuda_devices(gpu.fake.api());
  REQUIRE_OK(infos.status());
  REQUIRE(infos.value().size() == 2);
  CHECK_EQ(infos.value()[1].name, "Fake GPU 1");
  CHECK_EQ(infos.value()[1].total_bytes, 64 * kMiB);
  CHECK_EQ(infos.value()[0].free_bytes, 64 * kMiB);
  CHECK_EQ(infos.value()[1].free_bytes, 58 * kMiB);
  CHECK_EQ(infos.value()[1].capability_major, 9);
  CHECK_EQ(infos.value()[1].capability_minor, 0);
}

TEST(a_device_that_refuses_a_context_does_not_hide_the_others) {
  // The calls for the first device: 1 to count, 5 about it, 3 to open it.
  Gpu gpu({2 * kMiB, 64 * kMiB, 2});
  gpu.fake.faults().fail(9, 1, Fault::kClean);
  const auto infos = list_cuda_devices(gpu.fake.api());
  REQUIRE_OK(infos.status());
  REQUIRE(infos.value().size() == 2);
  CHECK_EQ(gpu.fake.faults().faults(), 1u);
  CHECK_EQ(infos.value()[0].name, "Fake GPU 0");
  CHECK_EQ(infos.value()[0].total_bytes, 64 * kMiB);
  CHECK_EQ(infos.value()[0].free_bytes, 0u);
  CHECK_EQ(infos.value()[1].free_bytes, 64 * kMiB);
}

TEST(any_call_of_listing_may_fail) {
  for (uint64_t n = 1;; ++n) {
    FakeCuda fake({});
    fake.faults().fail(n, 1, Fault::kClean);
    const auto infos = list_cuda_devices(fake.api());
    if (fake.faults().faults() == 0) break;
    // Only what is free may stay unknown.
    if (!infos.ok()) CHECK(says(infos.status(), "CUDA_ERROR_UNKNOWN"));
    CHECK_EQ(infos.ok(), n > 6);
    REQUIRE(n < 20);
  }
}

}  // namespace
}  // namespace ellm
