// CudaDriver: how it uses CUDA, and what it makes of every failure. What all drivers promise is in
// driver_test.cc.
#include "memory/cuda_driver.h"

#include <functional>
#include <string>
#include <vector>

#include "cuda_gpu.h"
#include "kv/registry.h"

namespace ellm {
namespace {

// A range of `chunks` and as many handles, given back at the end.
struct Range {
  Range(std::shared_ptr<CudaDriver> under_test, size_t chunks)
      : driver(std::move(under_test)), bytes(chunks * kCudaChunk), handles(chunks) {
    REQUIRE_OK(driver->reserve(bytes, kCudaChunk, &base));
    for (Handle& handle : handles) REQUIRE_OK(driver->create(kCudaChunk, &handle));
  }
  ~Range() {
    CHECK_OK(driver->unmap(base, bytes));
    for (const Handle handle : handles) CHECK_OK(driver->destroy(handle, kCudaChunk));
    CHECK_OK(driver->release(base, bytes));
  }
  std::byte* chunk(size_t i) const { return base + i * kCudaChunk; }
  Status map(size_t first, size_t n) {
    return driver->map(chunk(first), &handles[first], n, kCudaChunk);
  }

  std::shared_ptr<CudaDriver> driver;
  std::byte* base = nullptr;
  size_t bytes;
  std::vector<Handle> handles;
};

// Slots of 8 chunks for 64 tokens.
KvLayout chunk_layout() {
  KvLayout layout = page_layout(2, 64);
  layout.chunk_bytes = kCudaChunk;
  layout.slot_bytes = layout.chunks_for(layout.max_tokens) * layout.chunk_bytes;
  return layout;
}

TEST(devices_that_are_not_there_or_cannot_map_are_refused) {
  Gpu gpu({2 * kMiB, 64 * kMiB, 2, false});
  for (const int ordinal : {-1, 2}) {
    const Status s = CudaDevice::Open(gpu.fake.api(), ordinal).status();
    CHECK_EQ(s.code(), Code::kInvalid);
    CHECK(says(s, "there are 2, from cuda:0"));
  }
  const Status s = CudaDriver::Create(gpu.device(1)).status();
  CHECK_EQ(s.code(), Code::kDriver);
  CHECK(says(s, "cuda:1 has no virtual memory management"));
}

TEST(memory_comes_in_the_devices_granularity) {
  Gpu gpu;
  const auto driver = gpu.driver();
  CHECK_EQ(driver->granularity_bytes(), kCudaChunk);
  CHECK(driver->reach() == Reach::kDevice);
  Handle handle;
  const Status s = driver->create(kMiB, &handle);
  CHECK_EQ(s.code(), Code::kInvalid);
  CHECK(says(s, "pieces of 2 MiB"));
  CHECK_EQ(ChunkPool::Create(driver, kMiB, 64 * kMiB).status().code(), Code::kInvalid);
  CHECK_EQ(gpu.fake.calls_of("cuMemCreate"), 0u);
}

TEST(neighbours_share_one_call_for_access_and_one_to_unmap) {
  Gpu gpu;
  Range r(gpu.driver(), 6);
  REQUIRE_OK(r.map(0, 5));
  CHECK_EQ(gpu.fake.calls_of("cuMemMap"), 5u);
  CHECK_EQ(gpu.fake.calls_of("cuMemSetAccess"), 1u);
  REQUIRE_OK(r.driver->unmap(r.chunk(0), 5 * kCudaChunk));
  CHECK_EQ(gpu.fake.calls_of("cuMemUnmap"), 1u);
  // With a gap between them they are two runs.
  REQUIRE_OK(r.map(0, 2));
  REQUIRE_OK(r.map(3, 2));
  REQUIRE_OK(r.driver->unmap(r.chunk(0), 6 * kCudaChunk));
  CHECK_EQ(gpu.fake.calls_of("cuMemUnmap"), 3u);
}

TEST(a_part_of_a_chunk_cannot_be_unmapped) {
  Gpu gpu({kMiB, 64 * kMiB});  // So that half a chunk is a multiple of the granularity.
  Range r(gpu.driver(), 3);
  REQUIRE_OK(r.map(0, 3));
  for (const size_t begin : {size_t{0}, kMiB, 3 * kMiB}) {
    CHECK_EQ(r.driver->unmap(r.base + begin, kMiB).code(), Code::kInvalid);
    CHECK_EQ(r.driver->unmap(r.base + begin, 3 * kMiB).code(), Code::kInvalid);
  }
  CHECK_EQ(gpu.fake.calls_of("cuMemUnmap"), 0u);
}

TEST(a_device_has_so_much_memory_and_no_more) {
  Gpu gpu({2 * kMiB, 9 * kMiB});
  const auto driver = gpu.driver();
  std::vector<Handle> handles(4);
  for (Handle& handle : handles) REQUIRE_OK(driver->create(kCudaChunk, &handle));
  Handle one_more;
  const Status s = driver->create(kCudaChunk, &one_more);
  CHECK_EQ(s.code(), Code::kDriver);
  CHECK(says(s, "cannot take 2 MiB of memory on cuda:0: CUDA_ERROR_OUT_OF_MEMORY"));
  REQUIRE_OK(driver->destroy(handles[2], kCudaChunk));
  CHECK_EQ(gpu.fake.used_bytes(0), 6 * kMiB);
  CHECK_OK(driver->create(kCudaChunk, &handles[2]));
}

TEST(devices_are_apart) {
  Gpu gpu({2 * kMiB, 64 * kMiB, 2});
  Range first(gpu.driver(0), 2), second(gpu.driver(1), 3);
  REQUIRE_OK(first.map(0, 2));
  REQUIRE_OK(second.map(0, 3));
  CHECK_EQ(gpu.fake.used_bytes(0), 4 * kMiB);
  CHECK_EQ(gpu.fake.used_bytes(1), 6 * kMiB);
  // A handle of one is nothing to the other.
  CHECK_EQ(first.driver->destroy(second.handles[0], kCudaChunk).code(), Code::kInvalid);
  *second.chunk(2) = std::byte{7};
  *first.chunk(0) = std::byte{8};
  CHECK_EQ(static_cast<int>(*second.chunk(2)), 7);
}

TEST(whatever_is_left_goes_with_the_driver) {
  Gpu gpu;
  {
    const auto driver = gpu.driver();
    std::byte* base;
    std::vector<Handle> handles(3);
    REQUIRE_OK(driver->reserve(8 * kCudaChunk, kCudaChunk, &base));
    for (Handle& handle : handles) REQUIRE_OK(driver->create(kCudaChunk, &handle));
    REQUIRE_OK(driver->map(base + kCudaChunk, handles.data(), 2, kCudaChunk));
    REQUIRE_OK(driver->map(base + 5 * kCudaChunk, handles.data(), 1, kCudaChunk));
    gpu.fake.launch(0, base + kCudaChunk, kCudaChunk);
  }
  CHECK_EQ(gpu.fake.used_bytes(0), 0u);
}

TEST(a_driver_with_nothing_mapped_waits_for_nobody) {
  Gpu gpu;
  const auto busy = gpu.driver();
  {
    const auto driver = gpu.driver();
    std::byte* base;
    Handle handle;
    REQUIRE_OK(driver->reserve(kCudaChunk, kCudaChunk, &base));
    REQUIRE_OK(driver->create(kCudaChunk, &handle));
    REQUIRE_OK(driver->map(base, &handle, 1, kCudaChunk));
    REQUIRE_OK(driver->unmap(base, kCudaChunk));
  }
  const auto cache = make_cache(make_pool(busy, 64 * kMiB, kCudaChunk), chunk_layout());
  REQUIRE_OK(cache->close());
  CHECK_EQ(gpu.fake.calls_of("cuCtxSynchronize"), 0u);
}

// The next but one call of CUDA from now fails: after the one that makes the context current.
void fail_next_synchronize(FakeCuda& fake) {
  fake.faults().fail(fake.faults().calls() + 2, 1, Fault::kClean);
}

TEST(a_driver_that_cannot_wait_leaves_everything_as_it_is) {
  FakeCuda fake({});
  {
    const auto driver = CudaDriver::Create(CudaDevice::Open(fake.api(), 0).value()).value();
    std::byte* base;
    Handle handle;
    REQUIRE_OK(driver->reserve(kCudaChunk, kCudaChunk, &base));
    REQUIRE_OK(driver->create(kCudaChunk, &handle));
    REQUIRE_OK(driver->map(base, &handle, 1, kCudaChunk));
    fake.launch(0, base, kCudaChunk);
    fail_next_synchronize(fake);
  }
  CHECK_EQ(fake.calls_of("cuMemUnmap") + fake.calls_of("cuMemRelease"), 0u);
  CHECK_EQ(fake.violations(), "");
  CHECK_EQ(fake.leftovers(), "1 ranges\n1 allocations\n1 mappings\n");
}

// A cache over a device, with a slot that a kernel works on.
struct BusyCache {
  explicit BusyCache(Gpu& gpu, int ordinal = 0)
      : cache(make_cache(make_pool(gpu.driver(ordinal), 64 * kMiB, kCudaChunk), chunk_layout())),
        slot(cache->take_slot(0).value()) {
    REQUIRE_OK(extend(*cache, {slot}, {64}));
    gpu.fake.launch(ordinal, cache->slot_base(slot), cache->mapped_bytes(slot));
  }
  std::shared_ptr<KvCache> cache;
  int32_t slot;
};

TEST(a_cache_is_closed_after_what_still_runs) {
  Gpu gpu;
  BusyCache busy(gpu);
  REQUIRE_OK(busy.cache->close());
}

TEST(a_cache_that_cannot_wait_stays_mapped) {
  Gpu gpu;
  BusyCache busy(gpu);
  fail_next_synchronize(gpu.fake);
  const Status s = busy.cache->close();
  CHECK_EQ(s.code(), Code::kBroken);
  CHECK(says(s, "stays mapped"));
  CHECK_EQ(gpu.fake.calls_of("cuMemUnmap"), 0u);
  REQUIRE_OK(busy.cache->close());
  CHECK_EQ(busy.cache->pool()->usage().kv, 0u);
}

TEST(a_cache_that_ends_and_cannot_wait_is_left_to_the_driver) {
  Gpu gpu;
  BusyCache busy(gpu);
  const auto pool = busy.cache->pool();
  fail_next_synchronize(gpu.fake);
  busy.cache.reset();
  CHECK_EQ(gpu.fake.calls_of("cuMemUnmap"), 0u);
  CHECK_EQ(pool->usage().kv, 8 * kCudaChunk);  // Nobody gets them.
}

TEST(slots_of_a_failed_step_go_after_a_synchronize) {
  Gpu gpu;
  BusyCache busy(gpu);
  KvCache& cache = *busy.cache;
  // The order in which a recovery does it.
  REQUIRE_OK(cache.pool()->driver().synchronize());
  REQUIRE_OK(cache.release_async(busy.slot));
  CHECK_EQ(cache.trim_available().value(), 8 * kCudaChunk);
}

TEST(a_cache_is_found_on_the_device_of_its_memory_only) {
  Gpu gpu({2 * kMiB, 64 * kMiB, 2});
  BusyCache first(gpu, 0), second(gpu, 1);
  gpu.fake.finish_kernels();
  const int32_t one = register_kv(first.cache), two = register_kv(second.cache);
  CHECK(find_kv(one, 0) == first.cache);
  CHECK(find_kv(one, 1) == nullptr);
  CHECK(find_kv(two, 1) == second.cache);
  CHECK(find_kv(two, 0) == nullptr);
  const Status s = register_kv_group({{0, two}, {1, one}}).status();
  CHECK_EQ(s.code(), Code::kInvalid);
  CHECK(says(s, "is named for device 0, but its memory is on device 1"));
  const int32_t group = register_kv_group({{0, one}, {1, two}}).value();
  CHECK(find_kv(group, 0) == first.cache);
  CHECK(find_kv(group, 1) == second.cache);
  for (const int32_t id : {group, one, two}) unregister_kv(id);
}

TEST(a_slot_is_unmapped_when_the_step_that_wrote_it_is_over) {
  FakeCuda fake({});
  {
    const auto driver = CudaDriver::Create(CudaDevice::Open(fake.api(), 0).value()).value();
    std::byte* base;
    Handle handle;
    REQUIRE_OK(driver->reserve(kCudaChunk, kCudaChunk, &base));
    REQUIRE_OK(driver->create(kCudaChunk, &handle));
    REQUIRE_OK(driver->map(base, &handle, 1, kCudaChunk));
    fake.launch(0, base, kCudaChunk);
    REQUIRE_OK(driver->synchronize());
    REQUIRE_OK(driver->unmap(base, kCudaChunk));
    CHECK_EQ(fake.violations(), "");
    // Not before: the fake would notice.
    REQUIRE_OK(driver->map(base, &handle, 1, kCudaChunk));
    fake.launch(0, base, kCudaChunk);
    REQUIRE_OK(driver->unmap(base, kCudaChunk));
    CHECK(fake.violations().find("what a kernel or a copy touches") != std::string::npos);
  }
  CHECK_EQ(fake.leftovers(), "");
}

// Does each step until it works. What fails without kBroken has changed nothing. Returns the calls
// that it took, up to where nobody is left to tell.
uint64_t every_step(Gpu& gpu) {
  std::shared_ptr<CudaDevice> device;
  std::shared_ptr<CudaDriver> driver;
  const auto until_ok = [&](const char* what, const std::function<Status()>& step) {
    for (int attempt = 0; attempt < 5; ++attempt) {
      const uint64_t faults = gpu.fake.faults().faults();
      const Status s = step();
      if (s.ok()) return;
      check::report(gpu.fake.faults().faults() > faults, __FILE__, __LINE__,
                    std::string(what) + " failed without a fault: " + s.message());
    }
    check::report(false, __FILE__, __LINE__, std::string(what) + " fails for ever");
  };
  until_ok("open", [&] {
    auto opened = CudaDevice::Open(gpu.fake.api(), 0);
    if (opened.ok()) device = opened.value();
    return opened.status();
  });
  until_ok("make", [&] {
    auto made = CudaDriver::Create(device);
    if (made.ok()) driver = made.value();
    return made.status();
  });
  std::byte* base = nullptr;
  std::vector<Handle> handles(5);
  until_ok("reserve", [&] { return driver->reserve(5 * kCudaChunk, kCudaChunk, &base); });
  for (Handle& handle : handles) {
    until_ok("create", [&] { return driver->create(kCudaChunk, &handle); });
  }
  const auto chunk = [&](size_t i) { return base + i * kCudaChunk; };
  const auto map = [&](size_t first, size_t n) {
    until_ok("map", [&] {
      Status s = driver->map(chunk(first), &handles[first], n, kCudaChunk);
      if (s.ok()) return s;
      if (s.code() == Code::kBroken) {
        until_ok("unmap", [&] { return driver->unmap(chunk(first), n * kCudaChunk); });
      }
      for (size_t i = first; i < first + n; ++i) CHECK(!readable(chunk(i)));
      return s;
    });
    for (size_t i = first; i < first + n; ++i) *chunk(i) = static_cast<std::byte>(i + 1);
  };
  const auto unmap = [&](size_t first, size_t n) {
    until_ok("unmap", [&] { return driver->unmap(chunk(first), n * kCudaChunk); });
    for (size_t i = first; i < first + n; ++i) CHECK(!readable(chunk(i)));
  };
  map(0, 3);
  map(3, 2);
  unmap(1, 3);
  for (const size_t i : {size_t{0}, size_t{4}}) {
    CHECK_EQ(static_cast<size_t>(*chunk(i)), i + 1);
  }
  until_ok("synchronize", [&] { return driver->synchronize(); });
  unmap(0, 5);
  map(1, 4);
  unmap(1, 4);
  for (const Handle handle : handles) {
    until_ok("destroy", [&] { return driver->destroy(handle, kCudaChunk); });
  }
  CHECK_EQ(gpu.fake.used_bytes(0), 0u);
  until_ok("release", [&] { return driver->release(base, 5 * kCudaChunk); });
  gpu.fake.faults().fail(0, 0, Fault::kClean);
  return gpu.fake.faults().calls();
}

TEST(any_call_of_cuda_may_fail) {
  uint64_t calls = 0;
  {
    Gpu gpu;
    calls = every_step(gpu);
  }
  CHECK(calls > 60);
  for (const Fault fault : {Fault::kClean, Fault::kHalfDone}) {
    for (const uint64_t in_a_row : {1, 2, 3}) {
      for (uint64_t n = 1; n <= calls && check::failures == 0; ++n) {
        Gpu gpu;
        gpu.fake.faults().fail(n, in_a_row, fault);
        every_step(gpu);
        CHECK(gpu.fake.faults().faults() > 0);
        if (check::failures > 0) {
          std::printf("     call %d of %d, %d in a row, kind %d\n", int(n), int(calls),
                      int(in_a_row), int(fault));
        }
      }
    }
  }
}

}  // namespace
}  // namespace ellm
