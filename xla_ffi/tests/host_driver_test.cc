// HostDriver against the kernel, beyond what every driver promises.
#include "memory/host_driver.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "driver_bench.h"
#include "fixtures.h"
#include "memory/mapping_table.h"

namespace ellm {
namespace {

// Filling the kernel's table takes too long where somebody has raised the limit.
constexpr size_t kLargestLimitToFill = 100000;

size_t max_map_count() {
  size_t count = SIZE_MAX;
  std::ifstream("/proc/sys/vm/max_map_count") >> count;
  if (count > kLargestLimitToFill) std::printf("     skipped: vm.max_map_count is %zu\n", count);
  return count;
}

// How many mappings the kernel keeps that overlap [from, to): all, or those that can be read.
size_t mappings(const std::byte* from, const std::byte* to, bool readable_only) {
  std::ifstream maps("/proc/self/maps");
  size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    const uintptr_t start = std::stoull(line, nullptr, 16);
    const uintptr_t end = std::stoull(line.substr(line.find('-') + 1), nullptr, 16);
    const bool wanted = !readable_only || line[line.find(' ') + 1] == 'r';
    count += wanted && end > reinterpret_cast<uintptr_t>(from) &&
             start < reinterpret_cast<uintptr_t>(to);
  }
  return count;
}

TEST(neighbouring_chunks_are_one_mapping_for_the_kernel) {
  Bench b(host_driver(), 64, 64);
  REQUIRE_OK(b.driver->map(b.page(0), b.handles.data(), 40, page_bytes()));
  REQUIRE_OK(b.driver->map(b.page(40), b.handles.data() + 40, 24, page_bytes()));
  CHECK_EQ(mappings(b.base, b.base + b.bytes, true), 1u);
}

TEST(destroyed_memory_is_reused_and_comes_back_empty) {
  Bench b(host_driver(), 1);
  const size_t chunk = 4 * page_bytes();
  Handle handles[3], again;
  for (Handle& handle : handles) REQUIRE_OK(b.driver->create(chunk, &handle));
  std::byte* base = nullptr;
  REQUIRE_OK(b.driver->reserve(chunk, page_bytes(), &base));
  REQUIRE_OK(b.driver->map(base, &handles[1], 1, chunk));
  std::memset(base, 0xff, chunk);
  REQUIRE_OK(b.driver->unmap(base, chunk));
  REQUIRE_OK(b.driver->destroy(handles[1], chunk));
  REQUIRE_OK(b.driver->destroy(handles[2], chunk));
  REQUIRE_OK(b.driver->create(chunk, &again));
  CHECK_EQ(again, handles[1]);
  REQUIRE_OK(b.driver->map(base, &again, 1, chunk));
  CHECK_EQ(static_cast<int>(base[5]), 0);
  REQUIRE_OK(b.driver->unmap(base, chunk));
  REQUIRE_OK(b.driver->release(base, chunk));
  CHECK_OK(b.driver->destroy(again, chunk));
  CHECK_OK(b.driver->destroy(handles[0], chunk));
}

TEST(the_mapping_table_counts_as_the_kernel_does) {
  const size_t pages = 60;
  Bench b(host_driver(), pages, 40);
  MappingTable table;
  std::vector<bool> mapped(pages, false);
  std::mt19937_64 random(check::seed);
  for (int step = 0; step < 400; ++step) {
    const size_t first = random() % pages;
    const size_t count = 1 + random() % std::min<size_t>(6, pages - first);
    const bool all_free = std::find(mapped.begin() + first, mapped.begin() + first + count, true) ==
                          mapped.begin() + first + count;
    if (all_free) {
      const size_t handle = random() % (b.handles.size() - count);
      REQUIRE_OK(b.driver->map(b.page(first), &b.handles[handle], count, page_bytes()));
      table.add(b.page(first), count * page_bytes(), b.handles[handle]);
    } else {
      REQUIRE_OK(b.driver->unmap(b.page(first), count * page_bytes()));
      table.remove(b.page(first), count * page_bytes());
    }
    std::fill(mapped.begin() + first, mapped.begin() + first + count, all_free);
    REQUIRE(CHECK_EQ(table.runs(), mappings(b.base, b.base + b.bytes, true)));
    // The kernel may save a gap at the end of the range, and have one more before the first run.
    const size_t all = mappings(b.base, b.base + b.bytes, false);
    REQUIRE(all <= table.kernel_mappings() + 1 && table.kernel_mappings() <= all + 1);
  }
}

TEST(mapping_stops_well_before_the_kernel_runs_out_of_mappings) {
  const size_t limit = max_map_count();
  if (limit > kLargestLimitToFill) return;
  // The same chunk again and again: no two of these mappings can merge.
  Bench b(host_driver(), limit, 1);
  const std::vector<Handle> same(limit, b.handles[0]);
  const size_t allowed = limit / 4 * 3;
  const Status s = b.driver->map(b.base, same.data(), allowed, page_bytes());
  CHECK_EQ(s.code(), Code::kDriver);
  CHECK(s.message().find("vm.max_map_count") != std::string::npos);
  CHECK_EQ(mappings(b.base, b.base + b.bytes, true), 0u);
  CHECK_OK(b.driver->map(b.base, same.data(), allowed - 1, page_bytes()));
  CHECK_EQ(b.driver->map(b.page(allowed), same.data(), 1, page_bytes()).code(), Code::kDriver);
  // Making room in the middle gives exactly that room.
  CHECK_OK(b.driver->unmap(b.page(100), 50 * page_bytes()));
  CHECK_EQ(b.driver->map(b.page(100), same.data(), 50, page_bytes()).code(), Code::kDriver);
  CHECK_OK(b.driver->map(b.page(101), same.data(), 47, page_bytes()));
}

TEST(when_others_use_up_the_mappings_a_map_fails_and_an_unmap_can_be_repeated) {
  const size_t limit = max_map_count();
  if (limit > kLargestLimitToFill) return;
  Bench b(host_driver(), 64, 1);
  const std::vector<Handle> same(64, b.handles[0]);
  // Every other page of a range of somebody else's gets its own protection.
  const size_t pages = limit * 2;
  auto* const others = static_cast<std::byte*>(
      mmap(nullptr, pages * page_bytes(), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  REQUIRE(others != MAP_FAILED);
  size_t page = 1;
  while (mprotect(others + page * page_bytes(), page_bytes(), PROT_READ) == 0) page += 2;
  // Leaves room for some of the 64 mappings.
  for (size_t i = 0; i < 10; ++i) {
    page -= 2;
    mprotect(others + page * page_bytes(), page_bytes(), PROT_NONE);
  }
  const Status s = b.driver->map(b.base, same.data(), 64, page_bytes());
  const Status undone = b.driver->unmap(b.base, b.bytes);
  munmap(others, pages * page_bytes());

  CHECK(s.code() == Code::kDriver || s.code() == Code::kBroken);
  CHECK(s.message().find("vm.max_map_count") != std::string::npos);
  CHECK_EQ(undone.ok(), s.code() == Code::kDriver);
  CHECK_OK(b.driver->unmap(b.base, b.bytes));
  for (size_t i = 0; i < 64; ++i) CHECK(!readable(b.page(i)));
  CHECK_OK(b.driver->map(b.base, same.data(), 64, page_bytes()));
}

}  // namespace
}  // namespace ellm
