// Large pages: what the host driver takes, what the pool keeps together, and where the KV cache
// puts it.
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fixtures.h"
#include "memory/backed_chunks.h"

namespace ellm {
namespace {

// Chunks in a large page of these tests.
constexpr size_t kGroup = 4;

// 0, with a word about it, where there are no large pages.
size_t large_bytes() {
  const size_t bytes = host_driver()->large_bytes();
  if (bytes == 0) std::printf("     skipped: this system has no large pages\n");
  return bytes;
}

// Bytes of the mappings in [from, to) that the processor sees as large pages.
size_t mapped_large(const std::byte* from, const std::byte* to) {
  std::ifstream maps("/proc/self/smaps");
  size_t bytes = 0;
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    const size_t dash = line.find('-');
    if (dash != std::string::npos && line.find(':') > line.find(' ')) {
      const uintptr_t start = std::stoull(line, nullptr, 16);
      inside =
          start >= reinterpret_cast<uintptr_t>(from) && start < reinterpret_cast<uintptr_t>(to);
    } else if (inside && line.rfind("ShmemPmdMapped:", 0) == 0) {
      bytes += std::stoull(line.substr(15)) * 1024;
    }
  }
  return bytes;
}

// Whether this kernel makes a large page of a memory file's when it is asked to.
bool kernel_makes_large_pages(size_t bytes) {
  const int fd = memfd_create("probe", MFD_CLOEXEC);
  REQUIRE(fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes)) == 0);
  void* reserved =
      mmap(nullptr, 2 * bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(reserved) + bytes - 1) / bytes * bytes;
  void* at = mmap(reinterpret_cast<void*>(aligned), bytes, PROT_READ | PROT_WRITE,
                  MAP_SHARED | MAP_FIXED, fd, 0);
  REQUIRE(at != MAP_FAILED);
  *static_cast<volatile char*>(at) = 1;
  const bool made = madvise(at, bytes, 25) == 0;
  munmap(reserved, 2 * bytes);
  close(fd);
  if (!made) std::printf("     skipped: this kernel makes no large pages of memory files\n");
  return made;
}

// Bytes of all files of chunks that this process has open.
size_t file_bytes() {
  size_t bytes = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code error;
    const std::string target = std::filesystem::read_symlink(entry.path(), error).string();
    struct stat status;
    if (!error && target.rfind("/memfd:ellm-chunks", 0) == 0 &&
        stat(entry.path().c_str(), &status) == 0) {
      bytes += static_cast<size_t>(status.st_blocks) * 512;
    }
  }
  return bytes;
}

// An address of which nothing is touched, `chunks` past the begin of a large page.
const std::byte* place(size_t chunks, size_t chunk_bytes) {
  return reinterpret_cast<const std::byte*>((size_t{1} << 40) + chunks * chunk_bytes);
}

std::vector<Handle> handles_of(const ChunkPool& pool, const std::vector<ChunkId>& ids) {
  std::vector<Handle> handles;
  for (const ChunkId id : ids) handles.push_back(pool.handle(id).value());
  return handles;
}

// Whether handles[first] and on are one large page.
bool together(const std::vector<Handle>& handles, size_t first, size_t chunk_bytes) {
  bool all = handles[first] % (kGroup * chunk_bytes) == 0;
  for (size_t i = 1; i < kGroup; ++i) all &= handles[first + i] == handles[first] + i * chunk_bytes;
  return all;
}

TEST(large_memory_is_aligned_mapped_as_such_empty_and_given_back_in_parts) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t chunk = large / kGroup;
  const auto driver = host_driver();
  Handle small, handles[2 * kGroup];
  REQUIRE_OK(driver->create(page_bytes(), &small));
  REQUIRE_OK(driver->create_large(chunk, 2 * kGroup, handles));
  CHECK_EQ(handles[0] % large, 0u);
  for (size_t i = 1; i < 2 * kGroup; ++i) CHECK_EQ(handles[i], handles[0] + i * chunk);
  CHECK_EQ(file_bytes(), page_bytes() + 2 * large);

  std::byte* base = nullptr;
  REQUIRE_OK(driver->reserve(4 * large, large, &base));
  REQUIRE_OK(driver->map(base, handles, 2 * kGroup, chunk));
  if (kernel_makes_large_pages(large)) CHECK_EQ(mapped_large(base, base + 2 * large), 2 * large);
  CHECK(std::all_of(base, base + 2 * large, [](std::byte b) { return b == std::byte{0}; }));
  std::memset(base, 0x3c, 2 * large);
  // A part of one at another address, and by itself.
  REQUIRE_OK(driver->map(base + 2 * large + chunk, &handles[2], 1, chunk));
  CHECK_EQ(static_cast<int>(base[2 * large + chunk + 5]), 0x3c);

  REQUIRE_OK(driver->unmap(base, 4 * large));
  REQUIRE_OK(driver->destroy(handles[1], chunk));
  CHECK_EQ(file_bytes(), page_bytes() + 2 * large - chunk);
  REQUIRE_OK(driver->map(base, handles, 1, chunk));
  CHECK_EQ(static_cast<int>(base[chunk - 1]), 0x3c);
  // Its place is used again, after the room below the large pages, and comes back empty.
  std::vector<Handle> again;
  while (again.empty() || again.back() < handles[0]) {
    REQUIRE_OK(driver->create(chunk, &again.emplace_back()));
  }
  CHECK_EQ(again.back(), handles[1]);
  REQUIRE_OK(driver->map(base + chunk, &again.back(), 1, chunk));
  CHECK_EQ(static_cast<int>(base[chunk]), 0);
  REQUIRE_OK(driver->unmap(base, 2 * chunk));
  handles[1] = again.back();
  again.pop_back();
  for (const Handle handle : handles) CHECK_OK(driver->destroy(handle, chunk));
  for (const Handle handle : again) CHECK_OK(driver->destroy(handle, chunk));
  CHECK_EQ(file_bytes(), page_bytes());
  CHECK_OK(driver->release(base, 4 * large));
  CHECK_OK(driver->destroy(small, page_bytes()));
}

TEST(large_memory_comes_in_whole_large_pages) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const auto driver = host_driver();
  Handle handles[kGroup];
  CHECK_EQ(driver->create_large(large / kGroup, kGroup - 1, handles).code(), Code::kInvalid);
  CHECK_EQ(driver->create_large(large / kGroup, 0, handles).code(), Code::kInvalid);
  CHECK_EQ(driver->create_large(17, kGroup, handles).code(), Code::kInvalid);
  CHECK_EQ(file_bytes(), 0u);
}

TEST(backed_chunks_are_taken_so_that_groups_last) {
  std::mt19937_64 random(check::seed);
  const size_t chunk = 8;
  for (const size_t group : {size_t{1}, size_t{2}, kGroup, size_t{8}}) {
    BackedChunks backed(chunk, group);
    std::map<Handle, uint32_t> model;
    // The first handle of each complete group.
    const auto groups = [&] {
      std::vector<Handle> found;
      for (Handle first = 0; group > 1 && first < 64 * chunk; first += group * chunk) {
        bool all = true;
        for (size_t i = 0; i < group; ++i) all &= model.count(first + i * chunk) == 1;
        if (all) found.push_back(first);
      }
      return found;
    };
    const auto in_one = [&](const std::vector<Handle>& found, Handle handle) {
      return std::count(found.begin(), found.end(), handle / (group * chunk) * (group * chunk)) > 0;
    };
    for (int step = 0; step < 3000; ++step) {
      const std::vector<Handle> found = groups();
      const bool loose = model.size() > found.size() * group;
      const uint64_t what = random() % 8;
      if (what < 5) {
        const Handle handle = random() % 64 * chunk;
        if (model.emplace(handle, step).second) backed.add(handle, step);
      } else if (what == 5) {
        std::vector<uint32_t> indices(group);
        REQUIRE(CHECK_EQ(backed.take_group(indices.data()), !found.empty()));
        for (size_t i = 0; i < group && !found.empty(); ++i) {
          REQUIRE(CHECK_EQ(indices[i], model.at(found[0] + i * chunk)));
          model.erase(found[0] + i * chunk);
        }
      } else if (!model.empty()) {
        Handle handle;
        if (what == 6) {
          const uint32_t index = backed.take();
          const auto it = std::find_if(model.begin(), model.end(),
                                       [&](const auto& entry) { return entry.second == index; });
          REQUIRE(it != model.end());
          handle = it->first;
        } else {
          const BackedChunks::Backed last = backed.take_last();
          handle = last.handle;
          REQUIRE(model.count(handle) == 1 && model.at(handle) == last.index);
        }
        CHECK(!loose || !in_one(found, handle));
        model.erase(handle);
      }
      REQUIRE(CHECK_EQ(backed.size(), model.size()));
      CHECK_EQ(backed.empty(), model.empty());
    }
  }
}

TEST(what_fills_large_pages_of_addresses_is_made_and_kept_together) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t c = large / kGroup;
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 30 * c, c);
  // One chunk before a large page, four of these, and two chunks after them; then one more chunk.
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 20, &ids, {{place(3, c), 19}, {place(0, c), 1}}));
  const std::vector<Handle> first = handles_of(*pool, ids);
  for (size_t i = 1; i < 17; i += kGroup) CHECK(together(first, i, c));
  // Free again, and taken again by others: who fills a large page gets one, who does not leaves
  // them whole.
  REQUIRE_OK(pool->release(ids));
  const uint64_t calls = driver->calls();
  std::vector<ChunkId> some, page;
  REQUIRE_OK(pool->acquire(Owner::kKv, 4, &some));
  for (const Handle handle : handles_of(*pool, some)) {
    CHECK_EQ(std::count(first.begin() + 1, first.begin() + 17, handle), 0);
  }
  REQUIRE_OK(pool->acquire(Owner::kKv, kGroup, &page, {{place(2 * kGroup, c), kGroup}}));
  CHECK(together(handles_of(*pool, page), 0, c));
  CHECK_EQ(driver->calls(), calls);  // Nothing had to be made.
  CHECK_EQ(pool->usage().physical, 20 * c);
  REQUIRE_OK(pool->release(some));
  REQUIRE_OK(pool->release(page));
}

TEST(few_large_pages_are_not_worth_making) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t c = large / kGroup;
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 30 * c, c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 3 * kGroup, &ids, {{place(0, c), 3 * kGroup}}));
  CHECK_EQ(driver->calls(), 3 * kGroup);  // A chunk at a time.
  REQUIRE_OK(pool->release(ids));
}

TEST(large_pages_of_several_places_are_made_together) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t c = large / kGroup;
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 60 * c, c);
  // A page each, with chunks before and behind it.
  std::vector<Destination> where;
  for (size_t i = 0; i < 5; ++i) where.push_back({place(100 * kGroup * i + 3, c), 7});
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 35, &ids, where));
  CHECK_EQ(driver->calls(), 1u + 5 * 3);
  const std::vector<Handle> handles = handles_of(*pool, ids);
  for (size_t i = 0; i < 5; ++i) CHECK(together(handles, 7 * i + 1, c));
  CHECK_EQ(std::set<Handle>(handles.begin(), handles.end()).size(), 35u);
  REQUIRE_OK(pool->release(ids));
}

TEST(few_large_pages_that_are_left_are_not_made_either) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t c = large / kGroup;
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 60 * c, c);
  std::vector<ChunkId> ids, more;
  REQUIRE_OK(pool->acquire(Owner::kKv, 2 * kGroup, &ids));
  REQUIRE_OK(pool->release(ids));
  // Of five pages two are filled by what is there.
  const uint64_t calls = driver->calls();
  REQUIRE_OK(pool->acquire(Owner::kKv, 5 * kGroup, &more, {{place(0, c), 5 * kGroup}}));
  CHECK_EQ(driver->calls(), calls + 3 * kGroup);
  CHECK_EQ(pool->usage().physical, 5 * large);
  REQUIRE_OK(pool->release(more));
}

TEST(small_memory_that_is_there_comes_before_large_that_is_not) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t c = large / kGroup;
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 24 * c, c);
  std::vector<ChunkId> ids, more;
  REQUIRE_OK(pool->acquire(Owner::kKv, 3, &ids));
  REQUIRE_OK(pool->release(ids));
  // As many chunks of memory as are asked for in all, though three are there in small pages.
  REQUIRE_OK(pool->acquire(Owner::kKv, 22, &more, {{place(0, c), 22}}));
  CHECK_EQ(pool->usage().physical, 22 * c);
  CHECK_EQ(driver->handle_count(), 22u);
  const std::vector<Handle> handles = handles_of(*pool, more);
  for (size_t i = 0; i < 4 * kGroup; i += kGroup) CHECK(together(handles, i, c));
  REQUIRE_OK(pool->release(more));
}

TEST(without_memory_for_a_large_page_the_ledger_is_as_before) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const size_t c = large / kGroup;
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 24 * c, c);
  std::vector<ChunkId> ids, more;
  REQUIRE_OK(pool->acquire(Owner::kKv, 1, &ids));
  for (const uint64_t call : {1, 2, 3}) {  // Four large pages, one chunk, one chunk.
    driver->fail(driver->calls() + call);
    CHECK_EQ(pool->acquire(Owner::kKv, 18, &more, {{place(3, c), 18}}).code(), Code::kDriver);
    CHECK(more.empty());
    CHECK_EQ(pool->usage().kv, c);
    CHECK_EQ(pool->usage().physical, pool->usage().kv + pool->usage().backed_free);
    CHECK_EQ(driver->handle_count() * c, pool->usage().physical);
    REQUIRE_OK(pool->trim(0).status());
  }
  REQUIRE_OK(pool->acquire(Owner::kKv, 18, &more, {{place(3, c), 18}}));
  CHECK(together(handles_of(*pool, more), 1, c));
  REQUIRE_OK(pool->release(more));
  REQUIRE_OK(pool->release(ids));
  REQUIRE_OK(pool->trim(0).status());
  CHECK_EQ(file_bytes(), 0u);
}

TEST(a_slot_has_large_pages_where_its_chunks_fill_them) {
  const size_t large = large_bytes();
  if (large == 0) return;
  const int64_t tokens = 8 * 23;
  KvLayout layout = page_layout(3, tokens);
  layout.chunk_bytes = static_cast<int64_t>(large / kGroup);
  layout.slot_bytes = layout.chunks_for(tokens) * layout.chunk_bytes;
  const auto driver = host_driver();
  const auto pool = make_pool(driver, 70 * (large / kGroup), large / kGroup);
  const auto cache = make_cache(pool, layout);
  // In one call, in parts, and ahead.
  const int32_t whole = cache->take_slot(tokens).value();
  const int32_t parts = cache->take_slot(tokens).value();
  const int32_t ahead = cache->take_slot(tokens).value();
  REQUIRE_OK(extend(*cache, {parts}, {8}));
  REQUIRE_OK(extend(*cache, {whole, parts}, {tokens, tokens}));
  CHECK_EQ(cache->premap(1, &ahead, &tokens).value(), 23u);
  REQUIRE_OK(cache->settle());
  size_t mapped = 0;
  for (const int32_t slot : {whole, parts, ahead}) {
    const std::vector<Handle> handles = handles_of(*pool, cache->slot_chunks(slot));
    REQUIRE(CHECK_EQ(handles.size(), 23u));
    const size_t past = reinterpret_cast<uintptr_t>(cache->slot_base(slot)) / pool->chunk_bytes();
    for (size_t i = (kGroup - past % kGroup) % kGroup; i + kGroup <= 23; i += kGroup) {
      if (slot == parts && i == 0) continue;  // Its first chunk came alone.
      CHECK(together(handles, i, pool->chunk_bytes()));
      mapped += large;
    }
  }
  CHECK(mapped >= 12 * large);
  if (kernel_makes_large_pages(large)) {
    CHECK_EQ(mapped_large(cache->slot_base(0), cache->slot_base(0) + layout.reserved_bytes()),
             mapped);
  }
  REQUIRE_OK(cache->close());
}

}  // namespace
}  // namespace ellm
