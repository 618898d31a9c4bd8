// ChunkPool: rules by hand, then random operations against a model of a few lines.
#include "memory/chunk_pool.h"

#include <algorithm>
#include <array>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fixtures.h"
#include "memory/text.h"

namespace ellm {
namespace {

const std::array<Owner, 5> kPlainOwners = {Owner::kKv, Owner::kCache, Owner::kActivation,
                                           Owner::kWeights, Owner::kWorkspace};
const std::array<Owner, 4> kChunkOwners = {Owner::kKv, Owner::kCache, Owner::kActivation,
                                           Owner::kWorkspace};

TEST(bytes_are_told_as_people_read_them) {
  CHECK_EQ(human_bytes(0), "0 bytes");
  CHECK_EQ(human_bytes(1536), "1536 bytes");
  CHECK_EQ(human_bytes(64 << 10), "64 KiB");
  CHECK_EQ(human_bytes(size_t{3} << 29), "1.50 GiB");
  CHECK_EQ(human_bytes((size_t{1} << 30) + 1), "1.00 GiB");
  CHECK_EQ(human_bytes(size_t{1} << 50), "1024 TiB");
}

TEST(owners_have_names) {
  for (const char* name : {"kv", "cache", "activation", "weights", "workspace", "available"}) {
    REQUIRE(owner_from_name(name).ok());
    CHECK_EQ(std::string(owner_name(owner_from_name(name).value())), name);
  }
  CHECK_EQ(owner_from_name("KV").status().code(), Code::kInvalid);
}

TEST(chunk_sizes_that_cannot_be_are_refused) {
  for (const size_t bytes : {size_t{0}, size_t{100}, 3 * page_bytes(), page_bytes() / 2}) {
    CHECK_EQ(ChunkPool::Create(memory_driver(), bytes, 1 << 20).status().code(), Code::kInvalid);
  }
}

TEST(acquire_is_all_or_nothing_and_says_why) {
  const size_t c = page_bytes();
  const auto pool = make_pool(memory_driver(), 4 * c + 100);
  std::vector<ChunkId> ids;
  CHECK_EQ(pool->acquire(Owner::kKv, 5, &ids).code(), Code::kOutOfMemory);
  CHECK(ids.empty());
  REQUIRE_OK(pool->acquire(Owner::kKv, 3, &ids));
  CHECK_EQ(pool->usage().free, c + 100);
  const Status s = pool->acquire(Owner::kCache, 2, &ids);
  CHECK_EQ(s.code(), Code::kOutOfMemory);
  for (const char* part : {"2 chunks of 4 KiB", "cache", "kv 12 KiB", "raise the limit"}) {
    CHECK(s.message().find(part) != std::string::npos);
  }
  CHECK_EQ(pool->acquire(Owner::kKv, SIZE_MAX, &ids).code(), Code::kOutOfMemory);
  CHECK_EQ(pool->acquire(Owner::kWeights, 1, &ids).code(), Code::kInvalid);
  CHECK_EQ(pool->acquire(Owner::kAvailable, 1, &ids).code(), Code::kInvalid);
  CHECK_EQ(ids.size(), 3u);
  check_ledger(*pool);
}

TEST(the_last_reference_frees_and_stale_ids_are_refused) {
  const auto pool = make_pool(memory_driver(), 4 * page_bytes());
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 1, &ids));
  const ChunkId id = ids[0];
  REQUIRE_OK(pool->retain(id));
  REQUIRE_OK(pool->release(id));
  CHECK_EQ(pool->usage().kv, page_bytes());
  REQUIRE_OK(pool->release(id));
  CHECK_EQ(pool->usage().kv, 0u);
  CHECK_EQ(pool->usage().backed_free, page_bytes());
  REQUIRE_OK(pool->acquire(Owner::kKv, 1, &ids));  // The same memory under a new id.
  CHECK(ids[1] != id);
  for (const ChunkId bad : {id, ChunkId{99}, ids[1] + 1, ChunkId{0}}) {
    CHECK_EQ(pool->release(bad).code(), Code::kInvalid);
    CHECK_EQ(pool->retain(bad).code(), Code::kInvalid);
    CHECK_EQ(pool->cache({bad}).code(), Code::kInvalid);
    CHECK_EQ(pool->uncache({bad}).status().code(), Code::kInvalid);
    CHECK_EQ(pool->handle(bad).status().code(), Code::kInvalid);
  }
  CHECK_EQ(pool->usage().kv, page_bytes());
  CHECK_OK(pool->release(ids[1]));
}

TEST(backed_memory_makes_way_for_plain_bytes) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 4 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 4, &ids));
  for (const ChunkId id : ids) REQUIRE_OK(pool->release(id));
  CHECK_EQ(driver->handle_count(), 4u);
  REQUIRE_OK(pool->reserve_bytes(Owner::kActivation, c + 1));
  CHECK_EQ(driver->handle_count(), 2u);
  CHECK_EQ(pool->usage().backed_free, 2 * c);
  ids.clear();
  REQUIRE_OK(pool->acquire(Owner::kKv, 2, &ids));
  CHECK_EQ(driver->calls(), 6u);  // 4 creates, 2 destroys: what was backed was used.
  CHECK_EQ(pool->reserve_bytes(Owner::kWeights, c).code(), Code::kOutOfMemory);
  CHECK_OK(pool->reserve_bytes(Owner::kWeights, c - 1));
  CHECK_EQ(pool->usage().free, 0u);
  CHECK_EQ(pool->reserve_bytes(Owner::kWeights, SIZE_MAX).code(), Code::kOutOfMemory);
  CHECK_EQ(pool->reserve_bytes(Owner::kAvailable, 1).code(), Code::kInvalid);
  check_ledger(*pool);
}

TEST(plain_bytes_and_chunks_of_one_owner_are_not_confused) {
  const auto pool = make_pool(memory_driver(), 4 * page_bytes());
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kWorkspace, 1, &ids));
  REQUIRE_OK(pool->reserve_bytes(Owner::kWorkspace, 10));
  CHECK_EQ(pool->usage().workspace, page_bytes() + 10);
  CHECK_EQ(pool->return_bytes(Owner::kWorkspace, 11).code(), Code::kInvalid);
  CHECK_EQ(pool->return_bytes(Owner::kKv, 1).code(), Code::kInvalid);
  CHECK_OK(pool->return_bytes(Owner::kWorkspace, 10));
  CHECK_EQ(pool->usage().workspace, page_bytes());
}

TEST(available_chunks_are_free_but_cannot_be_had) {
  const size_t c = page_bytes();
  const auto pool = make_pool(memory_driver(), 4 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 3, &ids));
  CHECK_EQ(pool->retire(ids).leading, ids.size());
  CHECK_EQ(pool->usage().free, 4 * c);
  CHECK_EQ(pool->usage().obtainable, c);
  CHECK_EQ(pool->usage().available, 3 * c);
  CHECK_EQ(pool->acquire(Owner::kKv, 2, &ids).code(), Code::kOutOfMemory);
  CHECK_EQ(pool->reserve_bytes(Owner::kActivation, c + 1).code(), Code::kOutOfMemory);
  CHECK_EQ(pool->set_limit(3 * c - 1).code(), Code::kOutOfMemory);
  CHECK_EQ(pool->retain(ids[0]).code(), Code::kInvalid);
  CHECK_EQ(pool->cache({ids[0]}).code(), Code::kInvalid);
  CHECK_EQ(pool->release({ids[0]}).code(), Code::kInvalid);  // It has no live reference.
  pool->revive({ids[0]});
  CHECK_EQ(pool->usage().kv, c);
  CHECK_EQ(pool->usage().available, 2 * c);
  check_ledger(*pool);
}

TEST(a_chunk_is_counted_once_and_belongs_to_whoever_uses_it) {
  const size_t c = page_bytes();
  const auto pool = make_pool(memory_driver(), 4 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 3, &ids));
  const std::vector<ChunkId> two = {ids[0], ids[1]};
  REQUIRE_OK(pool->cache(two));
  CHECK_EQ(pool->usage().kv, 3 * c);
  CHECK_EQ(pool->usage().cache, 0u);
  REQUIRE_OK(pool->retain(two));  // A second slot.
  CHECK_EQ(pool->usage().kv, 3 * c);
  REQUIRE_OK(pool->release(ids));  // The first one ends.
  CHECK_EQ(pool->usage().kv, 2 * c);
  const Retired second = pool->retire(two);  // The second one too, but it has them mapped still.
  CHECK_EQ(second.leading, 0u);
  CHECK_EQ(second.exclusive, 0u);
  CHECK_EQ(pool->usage().kv, 0u);
  CHECK_EQ(pool->usage().cache, 2 * c);
  REQUIRE_OK(pool->retain(two));  // A third.
  CHECK_EQ(pool->usage().kv, 2 * c);
  CHECK_EQ(pool->uncache({ids[0]}).value(), 0u);
  REQUIRE_OK(pool->release(two));
  CHECK_EQ(pool->usage().available, c);
  CHECK_EQ(pool->usage().cache, c);
  CHECK_EQ(pool->uncache({ids[1]}).value(), c);
  CHECK_EQ(pool->usage().available, 2 * c);
  REQUIRE_OK(pool->release(two, Reference::kIdle));
  CHECK_EQ(pool->usage().available, 0u);
  CHECK_EQ(pool->usage().backed_free, 3 * c);
  check_ledger(*pool);
}

TEST(caching_is_all_or_nothing) {
  const size_t c = page_bytes();
  const auto pool = make_pool(memory_driver(), 8 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 3, &ids));
  REQUIRE_OK(pool->acquire(Owner::kWorkspace, 1, &ids));
  CHECK_EQ(pool->cache({ids[0], ids[1], ids[0]}).code(), Code::kInvalid);
  CHECK_EQ(pool->cache({ids[0], ChunkId{99}}).code(), Code::kInvalid);
  CHECK_EQ(pool->cache(ids).code(), Code::kInvalid);  // The last one is no KV.
  REQUIRE_OK(pool->cache({ids[0], ids[1]}));
  CHECK_EQ(pool->cache({ids[2], ids[1]}).code(), Code::kInvalid);
  REQUIRE_OK(pool->release({ids[0], ids[1], ids[2]}));
  CHECK_EQ(pool->usage().cache, 2 * c);
  CHECK_EQ(pool->uncache({ids[0], ids[1], ids[0]}).status().code(), Code::kInvalid);
  CHECK_EQ(pool->uncache({ids[0], ids[2]}).status().code(), Code::kInvalid);
  CHECK_EQ(pool->usage().cache, 2 * c);
  CHECK_EQ(pool->uncache({ids[0], ids[1]}).value(), 2 * c);
  CHECK_EQ(pool->usage().free, 7 * c);
  check_ledger(*pool);
}

TEST(a_claim_counts_at_once_and_takes_no_more_than_there_is) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 5 * c);
  std::vector<ChunkId> ids, more;
  REQUIRE_OK(pool->acquire(Owner::kKv, 2, &ids));
  REQUIRE_OK(pool->release(ids[0]));
  const uint64_t calls = driver->calls();
  Claim claim = pool->claim_up_to(Owner::kKv, {nullptr, 3});
  CHECK_EQ(claim.chunks.size(), 3u);
  CHECK_EQ(std::count(claim.chunks.begin(), claim.chunks.end(), Claim::kUnmade), 2);
  CHECK_EQ(pool->usage().kv, 4 * c);
  CHECK_EQ(driver->calls(), calls);
  driver->fail(calls + 2);
  CHECK_EQ(pool->fill(std::move(claim), &more).code(), Code::kDriver);
  CHECK(more.empty());
  CHECK_EQ(pool->usage().kv, c);
  claim = pool->claim_up_to(Owner::kKv, {nullptr, 100});
  CHECK_EQ(claim.chunks.size(), 4u);
  CHECK(pool->claim_up_to(Owner::kKv, {nullptr, 1}).chunks.empty());
  REQUIRE_OK(pool->fill(std::move(claim), &more));
  CHECK_EQ(more.size(), 4u);
  CHECK_EQ(pool->usage().free, 0u);
  check_ledger(*pool);
}

TEST(the_limit_moves_while_memory_is_owned) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 8 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 6, &ids));
  for (size_t i = 2; i < 6; ++i) REQUIRE_OK(pool->release(ids[i]));
  CHECK_EQ(pool->set_limit(2 * c - 1).code(), Code::kOutOfMemory);
  CHECK_EQ(pool->usage().limit, 8 * c);
  CHECK_EQ(driver->handle_count(), 6u);
  REQUIRE_OK(pool->set_limit(3 * c + 5));
  CHECK_EQ(driver->handle_count(), 3u);
  check_ledger(*pool);
  REQUIRE_OK(pool->set_limit(size_t{1} << 45));
  CHECK_EQ(pool->usage().free, (size_t{1} << 45) - 2 * c);
}

TEST(trim_keeps_what_it_is_told) {
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 8 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 5, &ids));
  for (const ChunkId id : ids) REQUIRE_OK(pool->release(id));
  CHECK_EQ(pool->trim(3 * c + 1).value(), 2 * c);
  CHECK_EQ(pool->trim(3 * c).value(), 0u);
  CHECK_EQ(pool->trim(0).value(), 3 * c);
  CHECK_EQ(driver->leftovers(), "");
}

TEST(peaks_are_kept_until_reset) {
  const size_t c = page_bytes();
  const auto pool = make_pool(memory_driver(), 8 * c);
  std::vector<ChunkId> ids;
  REQUIRE_OK(pool->acquire(Owner::kKv, 5, &ids));
  REQUIRE_OK(pool->reserve_bytes(Owner::kActivation, 100));
  REQUIRE_OK(pool->return_bytes(Owner::kActivation, 100));
  CHECK_EQ(pool->retire(ids).leading, ids.size());
  CHECK_EQ(pool->usage().peak_kv, 5 * c);
  CHECK_EQ(pool->usage().peak_activation, 100u);
  CHECK_EQ(pool->usage().peak_available, 5 * c);
  CHECK_EQ(pool->usage().peak_used, 5 * c + 100);
  CHECK_EQ(pool->usage().peak_physical, 5 * c + 100);
  pool->reset_peaks();
  CHECK_EQ(pool->usage().peak_kv, 0u);
  CHECK_EQ(pool->usage().peak_available, 5 * c);
  CHECK_EQ(pool->usage().peak_used, 0u);
  CHECK_EQ(pool->usage().peak_physical, 5 * c);
}

TEST(a_chunk_still_owned_survives_the_pool) {
  const auto driver = faulty_driver();
  std::vector<ChunkId> ids;
  {
    const auto pool = make_pool(driver, 4 * page_bytes());
    REQUIRE_OK(pool->acquire(Owner::kKv, 3, &ids));
    REQUIRE_OK(pool->release(ids[1]));
  }
  CHECK_EQ(driver->handle_count(), 2u);
  CHECK_EQ(driver->violations(), "");
}

// What the pool should say, without a driver, in a few lines.
struct Model {
  struct Chunk {
    Owner acquired_for;
    int live = 1, idle = 0, cached = 0;

    Owner owner() const {
      return live > 0 ? acquired_for : cached ? Owner::kCache : Owner::kAvailable;
    }
    bool held() const { return live + idle + cached > 0; }
  };
  size_t limit, chunk_bytes;
  std::map<ChunkId, Chunk> chunks;
  std::map<Owner, size_t> plain;

  size_t owned(Owner owner) const {
    size_t bytes = plain.count(owner) ? plain.at(owner) : 0;
    for (const auto& [id, chunk] : chunks) bytes += chunk.owner() == owner ? chunk_bytes : 0;
    return bytes;
  }
  size_t obtainable() const {
    size_t bytes = limit - owned(Owner::kAvailable);
    for (const Owner owner : kPlainOwners) bytes -= owned(owner);
    return bytes;
  }
};

void compare(const ChunkPool& pool, const Model& model, const FaultyDriver& driver) {
  const Usage u = pool.usage();
  CHECK_EQ(u.limit, model.limit);
  CHECK_EQ(u.kv, model.owned(Owner::kKv));
  CHECK_EQ(u.cache, model.owned(Owner::kCache));
  CHECK_EQ(u.activation, model.owned(Owner::kActivation));
  CHECK_EQ(u.weights, model.owned(Owner::kWeights));
  CHECK_EQ(u.workspace, model.owned(Owner::kWorkspace));
  CHECK_EQ(u.available, model.owned(Owner::kAvailable));
  CHECK_EQ(u.obtainable, model.obtainable());
  CHECK_EQ(u.backed_free + model.chunks.size() * model.chunk_bytes,
           driver.handle_count() * model.chunk_bytes);
  check_ledger(pool);
}

// Random operations; with faults, calls of the driver fail now and then and change nothing.
void random_operations(uint64_t seed, bool with_faults, int steps) {
  std::mt19937_64 random(seed);
  const auto below = [&](size_t n) { return static_cast<size_t>(random() % n); };
  const size_t c = page_bytes();
  const auto driver = faulty_driver();
  const auto pool = make_pool(driver, 24 * c + 7);
  Model model{24 * c + 7, c, {}, {}};
  const auto some_id = [&] {
    const auto it = std::next(model.chunks.begin(), below(model.chunks.size()));
    return it->first;
  };
  const auto expected = [&](const Status& s, bool fits, uint64_t faults_before) {
    if (driver->faults() > faults_before) {
      CHECK(s.ok() || s.code() == Code::kDriver);
    } else {
      CHECK_EQ(s.code(), fits ? Code::kOk : Code::kOutOfMemory);
    }
    return s.ok();
  };
  for (int step = 0; step < steps && check::failures == 0; ++step) {
    if (with_faults && below(4) == 0) driver->fail(driver->calls() + 1 + below(3), 1 + below(2));
    const uint64_t faults = driver->faults();
    switch (below(8)) {
      case 0:
      case 1: {
        const Owner owner = kChunkOwners[below(4)];
        const size_t n = below(9);
        std::vector<ChunkId> ids;
        if (expected(pool->acquire(owner, n, &ids), n * c <= model.obtainable(), faults)) {
          CHECK_EQ(ids.size(), n);
          for (const ChunkId id : ids) CHECK(model.chunks.emplace(id, Model::Chunk{owner}).second);
        } else {
          CHECK(ids.empty());
        }
        break;
      }
      case 2: {
        if (model.chunks.empty()) break;
        const ChunkId id = some_id();
        Model::Chunk& chunk = model.chunks[id];
        const bool allowed = chunk.live > 0 || chunk.cached;
        CHECK_EQ(pool->retain(id).ok(), allowed);
        chunk.live += allowed;
        break;
      }
      case 3:
      case 4: {
        if (model.chunks.empty()) break;
        const ChunkId id = some_id();
        Model::Chunk& chunk = model.chunks[id];
        const auto kind = below(2) == 0 ? Reference::kLive : Reference::kIdle;
        int& count = kind == Reference::kLive ? chunk.live : chunk.idle;
        CHECK_EQ(pool->release({id}, kind).ok(), count > 0);
        count -= count > 0;
        if (chunk.held()) break;
        model.chunks.erase(id);
        CHECK_EQ(pool->release(id).code(), Code::kInvalid);
        break;
      }
      case 5: {
        if (model.chunks.empty()) break;
        const ChunkId id = some_id();
        Model::Chunk& chunk = model.chunks[id];
        const size_t choice = below(4);
        if (choice == 0 && chunk.live > 0) {
          const bool exclusive = chunk.live == 1 && chunk.idle == 0 && !chunk.cached;
          CHECK_EQ(pool->retire({id}).exclusive, exclusive ? 1u : 0u);
          --chunk.live;
          ++chunk.idle;
        } else if (choice == 1 && chunk.idle > 0) {
          pool->revive({id});
          --chunk.idle;
          ++chunk.live;
        } else if (choice == 2) {
          const bool allowed = chunk.live > 0 && chunk.acquired_for == Owner::kKv && !chunk.cached;
          CHECK_EQ(pool->cache({id}).ok(), allowed);
          if (allowed) chunk.cached = 1;
        } else if (choice == 3) {
          const auto given = pool->uncache({id});
          CHECK_EQ(given.ok(), chunk.cached == 1);
          if (!given.ok()) break;
          CHECK_EQ(given.value(), chunk.live > 0 ? 0 : c);
          chunk.cached = 0;
          if (!chunk.held()) model.chunks.erase(id);
        }
        break;
      }
      case 6: {
        const Owner owner = kPlainOwners[below(5)];
        const size_t bytes = below(6 * c);
        if (below(2) == 0) {
          const bool fits = bytes <= model.obtainable();
          if (expected(pool->reserve_bytes(owner, bytes), fits, faults))
            model.plain[owner] += bytes;
        } else {
          const bool held = bytes <= model.plain[owner];
          const Status s = pool->return_bytes(owner, bytes);
          CHECK_EQ(s.code(), held ? Code::kOk : Code::kInvalid);
          if (s.ok()) model.plain[owner] -= bytes;
        }
        break;
      }
      case 7:
        if (below(2) == 0) {
          const size_t limit = below(40 * c);
          const bool fits = limit >= model.limit - model.obtainable();
          if (expected(pool->set_limit(limit), fits, faults)) model.limit = limit;
        } else {
          const size_t keep = below(10 * c);
          const auto trimmed = pool->trim(keep);
          if (expected(trimmed.status(), true, faults)) CHECK(pool->usage().backed_free <= keep);
        }
        break;
    }
    compare(*pool, model, *driver);
  }
  driver->fail(0, 0);
  for (const auto& [id, chunk] : model.chunks) {
    for (int i = 0; i < chunk.live; ++i) CHECK_OK(pool->release(id));
    for (int i = 0; i < chunk.idle; ++i) CHECK_OK(pool->release({id}, Reference::kIdle));
    if (chunk.cached) CHECK_OK(pool->uncache({id}).status());
  }
  CHECK_OK(pool->trim(0).status());
  CHECK_EQ(driver->leftovers(), "");
  CHECK_EQ(driver->violations(), "");
}

TEST(random_operations_match_the_model) {
  for (uint64_t round = 0; round < 20; ++round) random_operations(check::seed + round, false, 400);
}

TEST(random_operations_with_a_failing_driver_match_the_model) {
  for (uint64_t round = 0; round < 20; ++round) random_operations(check::seed + round, true, 400);
}

}  // namespace
}  // namespace ellm
