// What the memory tests share.
#pragma once

#include <unistd.h>

#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "check.h"
#include "faulty_driver.h"
#include "kv/kv_cache.h"
#include "memory/chunk_pool.h"
#include "memory/copy_link.h"
#include "memory/host_driver.h"

#ifdef ELLM_OVER_PINNED_CALLS
#define ELLM_OVER_PINNED 1
#endif

#if defined(ELLM_OVER_CUDA) || defined(ELLM_OVER_CUDA_CALLS) || defined(ELLM_OVER_PINNED)
#include "fake_cuda.h"
#include "memory/cuda_driver.h"
#include "memory/cuda_link.h"
#include "memory/pinned_driver.h"
#define ELLM_WITH_CUDA 1
#endif

namespace ellm {

// A status that has to be ok; prints its message if it is not.
inline bool passed(const Status& s, const char* file, int line) {
  return check::report(s.ok(), file, line, "not ok: " + s.message());
}
#define CHECK_OK(expression) ellm::passed((expression), __FILE__, __LINE__)
#define REQUIRE_OK(expression) \
  if (!CHECK_OK(expression)) throw check::Abandon()

// One page: the smallest chunk that a host driver takes, so that tests stay small.
inline size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

inline std::shared_ptr<HostDriver> host_driver() {
  auto driver = HostDriver::Create();
  REQUIRE_OK(driver.status());
  return driver.value();
}

// What a test is about: the same sources are built over host memory, over CUDA as the fake has it
// (ELLM_OVER_CUDA, with ELLM_OVER_CUDA_CALLS the calls that fail are those of CUDA itself), and
// over pinned host memory (ELLM_OVER_PINNED, and likewise ELLM_OVER_PINNED_CALLS).
#ifdef ELLM_WITH_CUDA

// With chunks of a page; what it has to say is checked after each test.
inline FakeCuda& fake_cuda() {
  static FakeCuda fake({page_bytes(), size_t{1} << 40, 1, true});
  return fake;
}
inline const bool checks_fake_cuda = [] {
  check::after_each().push_back([] {
    CHECK_EQ(fake_cuda().violations(), "");
    CHECK_EQ(fake_cuda().leftovers(), "");
  });
  return true;
}();

inline std::shared_ptr<CudaDevice> cuda_device() {
  auto device = CudaDevice::Open(fake_cuda().api(), 0);
  REQUIRE_OK(device.status());
  return device.value();
}

// Of blocks that are copied from and to.
inline std::shared_ptr<Driver> block_driver() {
  return std::make_shared<PinnedDriver>(host_driver(), cuda_device());
}

inline std::unique_ptr<CopyLink> copy_link() {
  auto link = CudaLink::Create(cuda_device());
  REQUIRE_OK(link.status());
  return std::move(link.value());
}

inline std::shared_ptr<Driver> memory_driver() {
#ifdef ELLM_OVER_PINNED
  return block_driver();
#else
  auto driver = CudaDriver::Create(cuda_device());
  REQUIRE_OK(driver.status());
  return driver.value();
#endif
}

#else

inline std::shared_ptr<Driver> block_driver() { return host_driver(); }
inline std::unique_ptr<CopyLink> copy_link() { return host_link(); }
inline std::shared_ptr<Driver> memory_driver() { return host_driver(); }

#endif

inline std::shared_ptr<FaultyDriver> faulty_driver() {
#if defined(ELLM_OVER_CUDA_CALLS) || defined(ELLM_OVER_PINNED_CALLS)
  return std::make_shared<FaultyDriver>(memory_driver(), &fake_cuda().faults());
#else
  return std::make_shared<FaultyDriver>(memory_driver());
#endif
}

inline std::shared_ptr<ChunkPool> make_pool(std::shared_ptr<Driver> driver, size_t limit_bytes,
                                            size_t chunk_bytes = page_bytes()) {
  auto pool = ChunkPool::Create(std::move(driver), chunk_bytes, limit_bytes);
  REQUIRE_OK(pool.status());
  return pool.value();
}

// Chunks of one page with 8 tokens each: 2 layers, 2 heads of 16 floats take 4096 bytes.
inline KvLayout page_layout(int64_t num_slots, int64_t max_tokens) {
  KvLayout layout;
  layout.layers = 2;
  layout.kv_heads = 2;
  layout.head_dim = 16;
  layout.element_bytes = 4;
  layout.tile_tokens = 8;
  layout.chunk_bytes = static_cast<int64_t>(page_bytes());
  layout.num_slots = num_slots;
  layout.max_tokens = max_tokens;
  layout.slot_bytes = layout.chunks_for(max_tokens) * layout.chunk_bytes;
  return layout;
}

inline std::shared_ptr<KvCache> make_cache(std::shared_ptr<ChunkPool> pool,
                                           const KvLayout& layout) {
  auto cache = KvCache::Create(std::move(pool), layout);
  REQUIRE_OK(cache.status());
  return cache.value();
}

inline Status extend(KvCache& cache, const std::vector<int32_t>& slots,
                     const std::vector<int64_t>& tokens) {
  return cache.extend(slots.size(), slots.data(), tokens.data());
}

// Whether the byte can be read, without trying it: the kernel copies it, or says EFAULT.
inline bool readable(const std::byte* at) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const bool copied = write(ends[1], at, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return copied;
}

// Invariant 1 and the physical rule.
inline void check_ledger(const ChunkPool& pool) {
  const Usage u = pool.usage();
  CHECK_EQ(u.free + u.kv + u.cache + u.activation + u.weights + u.workspace, u.limit);
  CHECK_EQ(u.obtainable + u.available, u.free);
  CHECK(u.physical <= u.limit);
  CHECK(u.backed_free <= u.obtainable);
}

}  // namespace ellm
