// Arena: rules by hand, and threads.
#include "memory/arena.h"

#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "arena_fixtures.h"

namespace ellm {
namespace {

// A segment of `chunks` chunks, written to all over.
std::byte* segment(Arena& arena, size_t chunks) {
  const auto at = arena.allocate(chunks * page_bytes());
  REQUIRE_OK(at.status());
  std::memset(at.value(), 0x33, chunks * page_bytes());
  return at.value();
}

TEST(segments_are_whole_chunks_that_are_the_activations) {
  const size_t c = page_bytes();
  const auto pool = make_pool(host_driver(), 8 * c);
  const auto arena = Arena::Create(pool, 10 * c - 1).value();
  CHECK_EQ(arena->usage().reserved, 10 * c);
  std::byte* a = arena->allocate(1).value();
  std::byte* b = arena->allocate(c + 1).value();
  CHECK_EQ(b - a, static_cast<ptrdiff_t>(c));
  CHECK_EQ(arena->usage().live, 3 * c);
  CHECK_EQ(pool->usage().activation, 3 * c);
  CHECK_OK(arena->free(a));
  CHECK_EQ(arena->usage().live, 2 * c);
  CHECK_EQ(arena->usage().inactive, c);
  CHECK_EQ(pool->usage().activation, 3 * c);
  CHECK_EQ(arena->collect(1).value(), c);
  CHECK_EQ(arena->collect(SIZE_MAX).value(), 0u);
  CHECK_EQ(pool->usage().activation, 2 * c);
  CHECK(!readable(a));
  CHECK(readable(b));
  CHECK_OK(arena->free(b));
  check_books(*arena);
}

TEST(what_cannot_be_is_refused) {
  const size_t c = page_bytes();
  const auto pool = make_pool(host_driver(), 8 * c);
  CHECK_EQ(Arena::Create(pool, 0).status().code(), Code::kInvalid);
  CHECK_EQ(Arena::Create(pool, SIZE_MAX).status().code(), Code::kInvalid);
  const auto arena = make_arena(pool, 6);
  CHECK_EQ(arena->allocate(0).status().code(), Code::kInvalid);
  CHECK_EQ(arena->allocate(SIZE_MAX).status().code(), Code::kOutOfMemory);
  CHECK_EQ(arena->allocate(6 * c + 1).status().code(), Code::kOutOfMemory);
  std::byte* at = segment(*arena, 2);
  CHECK_EQ(arena->free(at + 1).code(), Code::kInvalid);
  CHECK_EQ(arena->free(at + c).code(), Code::kInvalid);
  CHECK_EQ(arena->free(nullptr).code(), Code::kInvalid);
  CHECK_OK(arena->free(at));
  CHECK_EQ(arena->free(at).code(), Code::kInvalid);
}

TEST(freed_segments_join_on_both_sides) {
  const auto arena = make_arena(make_pool(host_driver(), 8 * page_bytes()), 6);
  std::byte* a = segment(*arena, 2);
  std::byte* b = segment(*arena, 2);
  std::byte* d = segment(*arena, 2);
  CHECK_OK(arena->free(a));
  CHECK_OK(arena->free(d));
  CHECK_EQ(arena->allocate(3 * page_bytes()).status().code(), Code::kOutOfMemory);
  CHECK_OK(arena->free(b));
  CHECK_EQ(segment(*arena, 6), a);
}

TEST(the_segment_with_most_mapped_is_preferred_then_the_smallest) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto arena = make_arena(make_pool(driver, 32 * c), 16);
  std::byte* three = segment(*arena, 3);
  std::byte* wall = segment(*arena, 1);
  std::byte* two = segment(*arena, 2);
  std::byte* wall_too = segment(*arena, 1);
  CHECK_OK(arena->free(three));
  CHECK_OK(arena->free(two));
  const uint64_t calls = driver->calls();
  CHECK_EQ(segment(*arena, 2), two);  // Both are mapped, and it is the smaller.
  CHECK_EQ(segment(*arena, 2), three);
  CHECK_EQ(driver->calls(), calls);
  // Of the place behind `three` one chunk is mapped: none fits better for one.
  CHECK_EQ(segment(*arena, 1), three + 2 * c);
  CHECK_EQ(driver->calls(), calls);
  // Unmapped and small, or larger and mapped: the mapped one.
  CHECK_OK(arena->free(two));
  CHECK_EQ(arena->collect(SIZE_MAX).value(), 2 * c);
  std::byte* tail = segment(*arena, 3);
  CHECK_OK(arena->free(tail));
  CHECK_EQ(segment(*arena, 2), tail);
  (void)wall;
  (void)wall_too;
}

TEST(a_partly_mapped_segment_gets_what_it_lacks) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 6 * c);
  const auto arena = make_arena(pool, 6);
  std::byte* a = segment(*arena, 2);
  std::byte* b = segment(*arena, 1);
  CHECK_OK(arena->free(a));
  CHECK_EQ(arena->collect(c).value(), c);  // The second of `a`.
  CHECK(readable(a));
  CHECK(!readable(a + c));
  CHECK_OK(arena->free(b));
  CHECK_EQ(arena->usage().inactive, 2 * c);
  CHECK_EQ(segment(*arena, 5), a);
  CHECK_EQ(pool->usage().activation, 5 * c);
  check_books(*arena);
}

TEST(a_short_pool_is_helped_with_what_is_inactive_elsewhere) {
  const size_t c = page_bytes();
  const auto pool = make_pool(host_driver(), 6 * c);
  const auto arena = make_arena(pool, 12);
  std::byte* a = segment(*arena, 2);
  std::byte* wall = segment(*arena, 1);
  CHECK_OK(arena->free(a));
  segment(*arena, 4);  // 3 are free in the pool, one comes from `a`.
  CHECK_EQ(arena->usage().inactive, c);
  CHECK(readable(a));
  CHECK_EQ(pool->usage().activation, 6 * c);
  CHECK_EQ(arena->allocate(2 * c).status().code(), Code::kOutOfMemory);
  CHECK_OK(arena->free(wall));
  segment(*arena, 2);
  check_books(*arena);
}

TEST(many_chunks_are_mapped_and_unmapped_by_one_call) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto arena = make_arena(make_pool(driver, 64 * c), 64);
  const uint64_t before = driver->calls();
  std::byte* a = segment(*arena, 32);
  CHECK_EQ(driver->calls(), before + 33);  // 32 create, one map.
  CHECK_OK(arena->free(a));
  CHECK_EQ(arena->collect(SIZE_MAX).value(), 32 * c);
  CHECK_EQ(driver->calls(), before + 34);
}

TEST(threads_share_an_arena) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 24 * c);
  auto arena = make_arena(pool, 32);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 3; ++thread) {
    threads.emplace_back([&, thread] {
      std::mt19937_64 random(check::seed + static_cast<uint64_t>(thread));
      for (int step = 0; step < 300; ++step) {
        const size_t n = 1 + random() % 10;
        const auto at = arena->allocate(n * c);
        if (!at.ok()) {
          CHECK_EQ(at.status().code(), Code::kOutOfMemory);
          continue;
        }
        std::memset(at.value(), thread, n * c);
        if (random() % 3 == 0) CHECK_OK(arena->collect(random() % (8 * c)).status());
        for (size_t i = 0; i < n; ++i) {
          CHECK_EQ(static_cast<int>(at.value()[i * c + c / 2]), thread);
        }
        CHECK_OK(arena->free(at.value()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  check_books(*arena);
  CHECK_EQ(arena->usage().live, 0u);
  arena.reset();
  CHECK_OK(pool->trim(0).status());
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

}  // namespace
}  // namespace ellm
