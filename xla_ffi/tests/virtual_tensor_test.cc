// VirtualTensor: its states, its references, what it does when the driver fails.
#include "memory/virtual_tensor.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "fixtures.h"

namespace ellm {
namespace {

constexpr size_t kCapacity = 8;

// Two tensors over one range. At the end nothing may be left in the driver.
struct Bench {
  Bench() : driver(faulty_driver()), pool(make_pool(driver, 16 * page_bytes())) {
    REQUIRE_OK(driver->reserve(2 * kCapacity * page_bytes(), page_bytes(), &base));
    for (size_t i = 0; i < 2; ++i) {
      tensors.emplace_back(pool.get(), &stats, base + i * kCapacity * page_bytes(), kCapacity);
    }
  }
  ~Bench() {
    driver->fail(0, 0);
    for (VirtualTensor& t : tensors) CHECK_OK(t.release());
    CHECK_EQ(pool->usage().kv, 0u);
    CHECK_OK(driver->release(base, 2 * kCapacity * page_bytes()));
    CHECK_OK(pool->trim(0).status());
    CHECK_EQ(driver->leftovers(), "");
    CHECK_EQ(driver->violations(), "");
  }
  std::vector<ChunkId> acquire(size_t n) {
    std::vector<ChunkId> ids;
    REQUIRE_OK(pool->acquire(Owner::kKv, n, &ids));
    return ids;
  }
  std::byte* page(size_t tensor, size_t i) { return tensors[tensor].base() + i * page_bytes(); }

  std::shared_ptr<FaultyDriver> driver;
  std::shared_ptr<ChunkPool> pool;
  MapStats stats;
  std::byte* base = nullptr;
  std::vector<VirtualTensor> tensors;
};

TEST(a_tensor_goes_from_reserved_to_mapped_and_back) {
  Bench b;
  VirtualTensor& t = b.tensors[0];
  CHECK_EQ(t.state(), TensorState::kReserved);
  CHECK_OK(t.extend({}));
  CHECK_EQ(t.state(), TensorState::kReserved);
  REQUIRE_OK(t.extend(b.acquire(3)));
  CHECK_EQ(t.state(), TensorState::kMapped);
  b.page(0, 2)[0] = std::byte{9};
  CHECK(!readable(b.page(0, 3)));
  REQUIRE_OK(t.extend(b.acquire(2)));
  CHECK_EQ(t.chunks().size(), 5u);
  CHECK_EQ(static_cast<int>(b.page(0, 2)[0]), 9);
  CHECK_OK(t.truncate(7));
  CHECK_EQ(t.chunks().size(), 5u);
  REQUIRE_OK(t.truncate(1));
  CHECK(readable(b.page(0, 0)));
  CHECK(!readable(b.page(0, 1)));
  CHECK_EQ(b.pool->usage().kv, page_bytes());
  REQUIRE_OK(t.truncate(0));
  CHECK_EQ(t.state(), TensorState::kReserved);
  CHECK_OK(t.release());
  CHECK_EQ(t.state(), TensorState::kReleased);
  CHECK_OK(t.release());
  CHECK_EQ(b.stats.map_calls.load(), 2u);
  CHECK_EQ(b.stats.unmap_calls.load(), 2u);
}

TEST(what_a_state_does_not_allow_is_refused_and_costs_no_chunk) {
  Bench b;
  VirtualTensor& t = b.tensors[0];
  CHECK_EQ(t.repair().code(), Code::kInvalid);
  CHECK_EQ(t.extend(b.acquire(kCapacity + 1)).code(), Code::kInvalid);
  CHECK_EQ(t.extend({ChunkId{77}}).code(), Code::kInvalid);
  CHECK_EQ(b.pool->usage().kv, 0u);
  CHECK_OK(t.release());
  CHECK_EQ(t.extend(b.acquire(1)).code(), Code::kInvalid);
  CHECK_EQ(t.truncate(0).code(), Code::kInvalid);
  CHECK_EQ(b.pool->usage().kv, 0u);
}

TEST(a_shared_chunk_shows_the_same_bytes_and_lives_until_both_let_go) {
  Bench b;
  REQUIRE_OK(b.tensors[0].extend(b.acquire(2)));
  REQUIRE_OK(b.tensors[1].map_shared(b.tensors[0].chunks()));
  b.page(0, 1)[5] = std::byte{42};
  CHECK_EQ(static_cast<int>(b.page(1, 1)[5]), 42);
  CHECK_EQ(b.pool->usage().kv, 2 * page_bytes());
  REQUIRE_OK(b.tensors[0].release());
  CHECK_EQ(static_cast<int>(b.page(1, 1)[5]), 42);
  CHECK_EQ(b.pool->usage().kv, 2 * page_bytes());
  REQUIRE_OK(b.tensors[1].truncate(0));
  CHECK_EQ(b.pool->usage().kv, 0u);
}

TEST(sharing_an_unknown_chunk_changes_nothing) {
  Bench b;
  REQUIRE_OK(b.tensors[0].extend(b.acquire(1)));
  const ChunkId known = b.tensors[0].chunks()[0];
  CHECK_EQ(b.tensors[1].map_shared({known, ChunkId{99}}).code(), Code::kInvalid);
  CHECK_EQ(b.pool->retire({known}).exclusive, 1u);  // Nobody else has a reference.
  b.pool->revive({known});
  CHECK_EQ(b.tensors[1].state(), TensorState::kReserved);
}

TEST(a_failed_map_leaves_the_tensor_as_it_was) {
  Bench b;
  VirtualTensor& t = b.tensors[0];
  REQUIRE_OK(t.extend(b.acquire(2)));
  const std::vector<ChunkId> more = b.acquire(3);
  b.driver->fail(b.driver->calls() + 1);
  CHECK_EQ(t.extend(more).code(), Code::kDriver);
  CHECK_EQ(t.state(), TensorState::kMapped);
  CHECK_EQ(t.chunks().size(), 2u);
  CHECK_EQ(b.pool->usage().kv, 2 * page_bytes());
  CHECK_OK(t.extend(b.acquire(3)));
}

TEST(a_map_that_cannot_be_undone_breaks_the_tensor_until_it_is_repaired) {
  Bench b;
  VirtualTensor& t = b.tensors[0];
  REQUIRE_OK(t.extend(b.acquire(1)));
  const std::vector<ChunkId> more = b.acquire(4);
  b.driver->fail(b.driver->calls() + 1, 1, FaultyDriver::Fault::kHalfDone);
  CHECK_EQ(t.extend(more).code(), Code::kBroken);
  CHECK_EQ(t.state(), TensorState::kBroken);
  CHECK_EQ(b.pool->usage().kv, 5 * page_bytes());  // Nobody gets what may still be mapped.
  CHECK_EQ(t.extend(b.acquire(1)).code(), Code::kInvalid);
  CHECK_EQ(t.truncate(0).code(), Code::kInvalid);
  b.driver->fail(b.driver->calls() + 1);
  CHECK_EQ(t.repair().code(), Code::kBroken);
  CHECK_EQ(t.state(), TensorState::kBroken);
  CHECK_OK(t.repair());
  CHECK_EQ(t.state(), TensorState::kReserved);
  CHECK_EQ(b.pool->usage().kv, 0u);
  CHECK_OK(t.extend(b.acquire(2)));
}

TEST(a_failed_unmap_keeps_every_chunk) {
  for (const auto fault : {FaultyDriver::Fault::kClean, FaultyDriver::Fault::kHalfDone}) {
    Bench b;
    VirtualTensor& t = b.tensors[0];
    REQUIRE_OK(t.extend(b.acquire(6)));
    b.driver->fail(b.driver->calls() + 1, 2, fault);
    CHECK_EQ(t.truncate(2).code(), Code::kBroken);
    CHECK_EQ(t.state(), TensorState::kBroken);
    CHECK_EQ(t.chunks().size(), 6u);
    CHECK_EQ(b.pool->usage().kv, 6 * page_bytes());
    CHECK_EQ(t.release().code(), Code::kBroken);
    CHECK_EQ(t.state(), TensorState::kBroken);
    CHECK_OK(t.release());
    CHECK_EQ(t.state(), TensorState::kReleased);
  }
}

TEST(a_destroyed_tensor_unmaps_and_a_moved_one_does_not) {
  Bench b;
  {
    VirtualTensor first(b.pool.get(), &b.stats, b.base, kCapacity);
    REQUIRE_OK(first.extend(b.acquire(2)));
    VirtualTensor second(std::move(first));
    CHECK_EQ(first.state(), TensorState::kReleased);
    CHECK_EQ(second.chunks().size(), 2u);
    CHECK(readable(b.base));
  }
  CHECK(!readable(b.base));
  CHECK_EQ(b.pool->usage().kv, 0u);
}

}  // namespace
}  // namespace ellm
