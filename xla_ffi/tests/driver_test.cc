// What a driver promises, over each of those that there are.
#include <cstdint>
#include <cstring>
#include <vector>

#include "driver_bench.h"
#include "fixtures.h"

namespace ellm {
namespace {

TEST(one_chunk_at_two_addresses_shows_the_same_bytes) {
  Bench b(memory_driver(), 4, 1);
  REQUIRE_OK(b.driver->map(b.page(0), b.handles.data(), 1, page_bytes()));
  REQUIRE_OK(b.driver->map(b.page(2), b.handles.data(), 1, page_bytes()));
  std::memset(b.page(0), 0x5a, page_bytes());
  CHECK_EQ(std::memcmp(b.page(0), b.page(2), page_bytes()), 0);
  b.page(2)[17] = std::byte{7};
  CHECK_EQ(static_cast<int>(b.page(0)[17]), 7);
  REQUIRE_OK(b.driver->unmap(b.page(0), page_bytes()));
  CHECK_EQ(static_cast<int>(b.page(2)[17]), 7);
}

TEST(data_survives_unmap_and_remap_elsewhere) {
  Bench b(memory_driver(), 4, 2);
  REQUIRE_OK(b.driver->map(b.page(0), b.handles.data(), 2, page_bytes()));
  std::memset(b.page(0), 1, page_bytes());
  std::memset(b.page(1), 2, page_bytes());
  REQUIRE_OK(b.driver->unmap(b.page(0), 2 * page_bytes()));
  const Handle swapped[] = {b.handles[1], b.handles[0]};
  REQUIRE_OK(b.driver->map(b.page(2), swapped, 2, page_bytes()));
  CHECK_EQ(static_cast<int>(b.page(2)[100]), 2);
  CHECK_EQ(static_cast<int>(b.page(3)[100]), 1);
}

TEST(what_is_not_mapped_cannot_be_touched) {
  Bench b(memory_driver(), 3, 1);
  for (size_t i = 0; i < 3; ++i) CHECK(!readable(b.page(i)));
  REQUIRE_OK(b.driver->map(b.page(1), b.handles.data(), 1, page_bytes()));
  CHECK(!readable(b.page(0)));
  CHECK(readable(b.page(1)));
  CHECK(readable(b.page(2) - 1));
  CHECK(!readable(b.page(2)));
  REQUIRE_OK(b.driver->unmap(b.page(1), page_bytes()));
  CHECK(!readable(b.page(1)));
}

TEST(several_chunks_go_together_or_in_parts) {
  Bench b(memory_driver(), 6, 6);
  REQUIRE_OK(b.driver->map(b.page(0), b.handles.data(), 6, page_bytes()));
  for (size_t i = 0; i < 6; ++i) *b.page(i) = static_cast<std::byte>(i + 1);
  REQUIRE_OK(b.driver->unmap(b.page(2), 2 * page_bytes()));
  for (size_t i = 0; i < 6; ++i) CHECK_EQ(readable(b.page(i)), i < 2 || i > 3);
  // Over a range with a gap, as after a failure half-way.
  REQUIRE_OK(b.driver->unmap(b.page(1), 4 * page_bytes()));
  CHECK_EQ(static_cast<int>(*b.page(0)), 1);
  CHECK_EQ(static_cast<int>(*b.page(5)), 6);
  REQUIRE_OK(b.driver->map(b.page(1), &b.handles[2], 2, page_bytes()));
  CHECK_EQ(static_cast<int>(*b.page(2)), 4);
  CHECK_OK(b.driver->synchronize());
}

TEST(ranges_are_aligned) {
  const auto driver = memory_driver();
  const size_t alignment = size_t{2} << 20;
  std::byte* first = nullptr;
  std::byte* second = nullptr;
  REQUIRE_OK(driver->reserve(3 * page_bytes(), alignment, &first));
  REQUIRE_OK(driver->reserve(alignment * 5, alignment, &second));
  CHECK_EQ(reinterpret_cast<uintptr_t>(first) % alignment, 0u);
  CHECK_EQ(reinterpret_cast<uintptr_t>(second) % alignment, 0u);
  CHECK_OK(driver->release(first, 3 * page_bytes()));
  CHECK_OK(driver->release(second, alignment * 5));
}

TEST(addresses_cost_no_memory) {
  const auto driver = memory_driver();
  const size_t bytes = size_t{1} << 42;  // 256 slots of 16 GiB, as a 128K-token model asks for.
  std::byte* base = nullptr;
  REQUIRE_OK(driver->reserve(bytes, size_t{2} << 20, &base));
  CHECK(!readable(base + bytes / 2));
  CHECK_OK(driver->release(base, bytes));
}

TEST(nonsense_is_refused) {
  Bench b(memory_driver(), 2, 1);
  std::byte* base = nullptr;
  Handle handle = 0;
  const Handle unknown = 12345 * page_bytes();
  CHECK_EQ(b.driver->reserve(page_bytes() + 1, page_bytes(), &base).code(), Code::kInvalid);
  CHECK_EQ(b.driver->reserve(page_bytes(), 3 * page_bytes(), &base).code(), Code::kInvalid);
  CHECK(!b.driver->reserve(SIZE_MAX / page_bytes() * page_bytes(), 1 << 21, &base).ok());
  CHECK(!b.driver->reserve(size_t{1} << 60, page_bytes(), &base).ok());
  CHECK_EQ(b.driver->create(0, &handle).code(), Code::kInvalid);
  CHECK_EQ(b.driver->create(100, &handle).code(), Code::kInvalid);
  CHECK_EQ(b.driver->destroy(unknown, page_bytes()).code(), Code::kInvalid);
  CHECK_EQ(b.driver->destroy(b.handles[0], 2 * page_bytes()).code(), Code::kInvalid);
  const Handle good_and_bad[] = {b.handles[0], unknown};
  CHECK_EQ(b.driver->map(b.page(0), good_and_bad, 2, page_bytes()).code(), Code::kInvalid);
  CHECK(!readable(b.page(0)));
}

}  // namespace
}  // namespace ellm
