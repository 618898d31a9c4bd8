// Copier and copy_slot: data there and back, order, and what goes wrong told instead of done.
#include "memory/copy_engine.h"

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fixtures.h"
#include "kv/slot_copy.h"
#include "memory/stream_copy.h"

namespace ellm {
namespace {

constexpr auto kOffload = CopyDirection::kOffload;
constexpr auto kFetch = CopyDirection::kFetch;

std::shared_ptr<HostBuffer> make_buffer(size_t blocks) {
  auto buffer = HostBuffer::Create(block_driver(), page_bytes(), blocks * page_bytes());
  REQUIRE_OK(buffer.status());
  return buffer.value();
}

std::vector<BlockId> take(HostBuffer& buffer, size_t n) {
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer.take(n, &blocks));
  return blocks;
}

// A cache with one slot in which `tiles` tiles are mapped.
struct Slot {
  explicit Slot(size_t tiles)
      : cache(make_cache(make_pool(memory_driver(), 64 * page_bytes()), page_layout(3, 128))),
        slot(cache->take_slot(0).value()),
        base(cache->slot_base(slot)) {
    CHECK_OK(extend(*cache, {slot}, {static_cast<int64_t>(tiles) * 8}));
  }
  std::shared_ptr<KvCache> cache;
  int32_t slot;
  std::byte* base;
};

void fill(std::byte* at, size_t bytes, uint64_t seed) {
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t word = random();
    std::memcpy(at + i, &word, 8);
  }
}

TEST(streaming_copies_every_byte_and_no_other) {
  alignas(64) std::byte from[512], to[640];
  fill(from, sizeof from, check::seed);
  for (size_t bytes = 0; bytes <= sizeof from; bytes += 64) {
    std::memset(to, 0x5a, sizeof to);
    stream_copy(to + 64, from, bytes);
    CHECK_EQ(std::memcmp(to + 64, from, bytes), 0);
    CHECK_EQ(static_cast<int>(to[63]), 0x5a);
    CHECK_EQ(static_cast<int>(to[64 + bytes]), 0x5a);
  }
}

TEST(tiles_come_back_as_they_went_whatever_the_blocks) {
  const size_t c = page_bytes();
  Slot kv(10);
  const auto buffer = make_buffer(8);
  std::vector<BlockId> blocks = take(*buffer, 8);
  blocks = {blocks[6], blocks[1], blocks[3], blocks[0]};
  std::vector<std::byte> before(10 * c);
  fill(kv.base, 10 * c, check::seed);
  std::memcpy(before.data(), kv.base, 10 * c);
  Copier copier(copy_link());
  const auto out = copy_slot(&copier, kOffload, kv.cache, kv.slot, 3, buffer, blocks);
  REQUIRE_OK(out.status());
  CHECK_OK(copier.wait(out.value()));
  CHECK_EQ(std::memcmp(kv.base, before.data(), 10 * c), 0);
  // Elsewhere in another slot, whose other tiles stay as they are.
  const int32_t other = kv.cache->take_slot(0).value();
  REQUIRE_OK(extend(*kv.cache, {other}, {48}));
  std::memset(kv.cache->slot_base(other), 0x11, 6 * c);
  const auto in = copy_slot(&copier, kFetch, kv.cache, other, 1, buffer, blocks);
  REQUIRE_OK(in.status());
  CHECK_OK(copier.wait(in.value()));
  CHECK_EQ(std::memcmp(kv.cache->slot_base(other) + c, before.data() + 3 * c, 4 * c), 0);
  CHECK_EQ(static_cast<int>(kv.cache->slot_base(other)[c - 1]), 0x11);
  CHECK_EQ(static_cast<int>(kv.cache->slot_base(other)[5 * c]), 0x11);
  const CopyStats stats = copier.stats();
  CHECK_EQ(stats.offload.bytes, 4 * c);
  CHECK_EQ(stats.fetch.bytes, 4 * c);
  CHECK_EQ(stats.offload.calls, 1u);
  CHECK_EQ(stats.fetch.calls, 1u);
  CHECK_OK(buffer->give_back(blocks));
}

// 2 layers, 2 heads of 20: tiles of 19 tokens in a page, the second one with 5.
TEST(scales_travel_with_their_values) {
  constexpr int64_t kTile = 19, kTokens = kTile + 5;
  KvLayout layout = page_layout(2, 2 * kTile);
  layout.head_dim = 20;
  layout.element_bytes = 1;
  layout.scale_bytes = 4;
  layout.tile_tokens = kTile;
  layout.slot_bytes = 2 * layout.chunk_bytes;
  const auto cache = make_cache(make_pool(memory_driver(), 8 * page_bytes()), layout);
  // Calls step(value row, scale, number of both) for all rows of a slot.
  const auto for_rows = [&](int32_t slot, const auto& step) {
    int32_t number = 0;
    for (int64_t token = 0; token < kTokens; ++token) {
      for (int64_t side = 0; side < layout.layers * 2 * layout.kv_heads; ++side) {
        const int64_t layer = side / 4, kv = side / 2 % 2, head = side % 2;
        std::byte* base = cache->slot_base(slot);
        step(base + layout.offset_bytes(layer, kv, head, token),
             base + layout.scale_offset_bytes(layer, kv, head, token), ++number);
      }
    }
  };
  const int32_t from = cache->take_slot(0).value(), to = cache->take_slot(0).value();
  REQUIRE_OK(extend(*cache, {from, to}, {kTokens, kTokens}));
  for_rows(from, [&](std::byte* row, std::byte* scale, int32_t number) {
    std::memset(row, number % 127, 20);
    std::memcpy(scale, &number, sizeof number);
  });
  const auto buffer = make_buffer(2);
  const std::vector<BlockId> blocks = take(*buffer, 2);
  Copier copier(copy_link());
  CHECK_OK(copier.wait(copy_slot(&copier, kOffload, cache, from, 0, buffer, blocks).value()));
  std::memset(cache->slot_base(from), 0, 2 * page_bytes());
  CHECK_OK(copier.wait(copy_slot(&copier, kFetch, cache, to, 0, buffer, blocks).value()));
  for_rows(to, [&](std::byte* row, std::byte* scale, int32_t number) {
    int32_t found;
    std::memcpy(&found, scale, sizeof found);
    CHECK_EQ(found, number);
    CHECK_EQ(static_cast<int>(row[0]), number % 127);
    CHECK_EQ(static_cast<int>(row[19]), number % 127);
  });
  CHECK_OK(buffer->give_back(blocks));
}

// Lets the copier's thread through only when it is opened.
class Gate {
 public:
  ChunkAddress before(std::byte* chunk) {
    return [this, chunk](size_t) -> Result<std::byte*> {
      std::unique_lock<std::mutex> lock(mutex_);
      visited_ = true;
      changed_.notify_all();
      changed_.wait(lock, [this] { return open_; });
      return chunk;
    };
  }
  void await_visitor() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return visited_; });
  }
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool visited_ = false, open_ = false;
};

TEST(copies_wait_their_turn_and_pin_their_blocks) {
  Slot kv(2);
  const auto buffer = make_buffer(2);
  const std::vector<BlockId> blocks = take(*buffer, 1), other = take(*buffer, 1);
  std::memset(kv.base, 1, page_bytes());
  std::memset(kv.base + page_bytes(), 2, page_bytes());
  Gate gate;
  Copier copier(copy_link());
  const Ticket first = copier.submit(kOffload, gate.before(kv.base), buffer, blocks).value();
  gate.await_visitor();
  // The block is read after it was written: the result shows the order.
  const Ticket second = copy_slot(&copier, kFetch, kv.cache, kv.slot, 1, buffer, blocks).value();
  CHECK_EQ(second, first + 1);
  CHECK(!copier.done(first).value());
  CHECK(!copier.done(second).value());
  CHECK_EQ(buffer->give_back(blocks).code(), Code::kInvalid);
  CHECK_OK(buffer->give_back(other));
  gate.open();
  CHECK_OK(copier.wait(second));
  CHECK(copier.done(first).value());
  CHECK_OK(copier.wait(first));
  CHECK_EQ(static_cast<int>(kv.base[page_bytes()]), 1);
  CHECK_OK(buffer->give_back(blocks));
}

TEST(what_cannot_be_is_refused_at_once) {
  Slot kv(4);
  const auto buffer = make_buffer(8);
  const std::vector<BlockId> blocks = take(*buffer, 4);
  Copier copier(copy_link());
  const auto code = [&](int32_t slot, int64_t tile, const std::vector<BlockId>& ids) {
    return copy_slot(&copier, kOffload, kv.cache, slot, tile, buffer, ids).status().code();
  };
  CHECK_EQ(code(-1, 0, blocks), Code::kInvalid);
  CHECK_EQ(code(3, 0, blocks), Code::kInvalid);
  CHECK_EQ(code(kv.slot, -1, blocks), Code::kInvalid);
  CHECK_EQ(code(kv.slot, 13, blocks), Code::kInvalid);  // A slot has 16 tiles.
  CHECK_EQ(code(kv.slot, 0, {7}), Code::kInvalid);
  const auto large = HostBuffer::Create(block_driver(), 2 * page_bytes(), 1 << 20).value();
  CHECK_EQ(
      copy_slot(&copier, kOffload, kv.cache, kv.slot, 0, large, take(*large, 1)).status().code(),
      Code::kInvalid);
  CHECK_EQ(copier.done(1).status().code(), Code::kInvalid);
  CHECK_EQ(copier.wait(0).code(), Code::kInvalid);
  CHECK_OK(buffer->give_back(blocks));
}

TEST(tiles_that_are_not_mapped_are_an_error_and_no_crash) {
  const size_t c = page_bytes();
  Slot kv(3);
  const auto buffer = make_buffer(4);
  const std::vector<BlockId> blocks = take(*buffer, 4);
  Copier copier(copy_link());
  const Ticket too_far = copy_slot(&copier, kOffload, kv.cache, kv.slot, 0, buffer, blocks).value();
  const Status s = copier.wait(too_far);
  CHECK_EQ(s.code(), Code::kDriver);
  CHECK(s.message().find("tile 3 of slot") != std::string::npos);
  CHECK_EQ(copier.wait(too_far).code(), Code::kDriver);
  CHECK_EQ(copier.stats().offload.calls, 0u);
  CHECK_EQ(copier.stats().offload.bytes, 3 * c);
  CHECK_OK(kv.cache->close());
  const Ticket closed = copy_slot(&copier, kFetch, kv.cache, kv.slot, 0, buffer, blocks).value();
  CHECK_EQ(copier.wait(closed).code(), Code::kDriver);
  CHECK_EQ(copier.stats().fetch.bytes, 0u);
  CHECK_OK(buffer->give_back(blocks));  // Not pinned any more.
}

TEST(what_is_under_way_holds_the_cache_and_the_buffer) {
  Slot kv(1);
  auto buffer = make_buffer(1);
  const std::vector<BlockId> blocks = take(*buffer, 1);
  Gate gate;
  Copier copier(copy_link());
  (void)copier.submit(kOffload, gate.before(kv.base), buffer, blocks).value();
  const Ticket last = copy_slot(&copier, kOffload, kv.cache, kv.slot, 0, buffer, blocks).value();
  const std::weak_ptr<HostBuffer> watched = buffer;
  const std::weak_ptr<KvCache> cache = kv.cache;
  buffer.reset();
  kv.cache.reset();
  gate.open();
  CHECK_OK(copier.wait(last));
  CHECK(watched.expired());
  CHECK(cache.expired());
}

TEST(closing_fails_what_is_not_done) {
  Slot kv(2);
  const auto buffer = make_buffer(2);
  const std::vector<BlockId> blocks = take(*buffer, 2);
  Gate gate;
  Copier copier(copy_link());
  const Ticket first = copier.submit(kOffload, gate.before(kv.base), buffer, blocks).value();
  const Ticket second = copy_slot(&copier, kOffload, kv.cache, kv.slot, 0, buffer, blocks).value();
  gate.await_visitor();
  std::thread closer([&] { copier.close(); });
  while (copier.submit(kOffload, gate.before(kv.base), buffer, {}).ok()) std::this_thread::yield();
  gate.open();
  copier.close();
  closer.join();
  CHECK_EQ(copier.wait(first).code(), Code::kDriver);
  CHECK_EQ(copier.wait(second).code(), Code::kDriver);
  CHECK(copier.done(second).value());
  CHECK_EQ(copier.submit(kFetch, nullptr, buffer, blocks).status().code(), Code::kInvalid);
  CHECK_OK(buffer->give_back(blocks));
}

// Threads with a slot and blocks each, as a host loop that moves requests out and in; the marks
// show whether anybody got anybody else's.
TEST(threads_share_a_copier) {
  const size_t c = page_bytes();
  constexpr int kThreads = 3;
  const auto buffer = make_buffer(4 * kThreads);
  std::vector<Slot> slots;
  for (int i = 0; i < kThreads; ++i) slots.emplace_back(4);
  Copier copier(copy_link());
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      Slot& kv = slots[i];
      for (int round = 0; round < 60; ++round) {
        const std::vector<BlockId> blocks = take(*buffer, 4);
        const uint64_t seed = check::seed + static_cast<uint64_t>(i * 1000 + round);
        fill(kv.base, 4 * c, seed);
        const Ticket out =
            copy_slot(&copier, kOffload, kv.cache, kv.slot, 0, buffer, blocks).value();
        while (!copier.done(out).value()) std::this_thread::yield();
        CHECK_OK(copier.wait(out));
        std::memset(kv.base, 0, 4 * c);
        const Ticket in = copy_slot(&copier, kFetch, kv.cache, kv.slot, 0, buffer, blocks).value();
        CHECK_OK(copier.wait(in));
        std::vector<std::byte> expected(4 * c);
        fill(expected.data(), 4 * c, seed);
        CHECK_EQ(std::memcmp(kv.base, expected.data(), 4 * c), 0);
        CHECK_OK(buffer->give_back(blocks));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(copier.stats().offload.bytes, copier.stats().fetch.bytes);
  CHECK_EQ(copier.stats().fetch.calls, 60u * kThreads);
}

}  // namespace
}  // namespace ellm
