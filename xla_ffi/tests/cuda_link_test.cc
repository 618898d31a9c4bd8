// CudaLink and a copier over it: copies in flight, both ways at once, and calls that fail. What all
// links promise is in copy_engine_test.cc.
#include "memory/cuda_link.h"

#include <condition_variable>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "cuda_gpu.h"
#include "memory/copy_engine.h"
#include "memory/pinned_driver.h"

namespace ellm {
namespace {

constexpr auto kOffload = CopyDirection::kOffload;
constexpr auto kFetch = CopyDirection::kFetch;
constexpr size_t kChunks = 12;  // More than are under way at once.
constexpr size_t kSmallChunk = 64 << 10;

// Mapped chunks on the device and blocks of pinned memory, all of them marked.
struct Ends {
  explicit Ends(Gpu& gpu, size_t bytes = kCudaChunk) : chunk_bytes(bytes), driver(gpu.driver()) {
    REQUIRE_OK(driver->reserve(kChunks * chunk_bytes, chunk_bytes, &base));
    for (size_t i = 0; i < kChunks; ++i) {
      Handle handle;
      REQUIRE_OK(driver->create(chunk_bytes, &handle));
      REQUIRE_OK(driver->map(chunk(i), &handle, 1, chunk_bytes));
      *chunk(i) = static_cast<std::byte>(i + 1);
    }
    auto made = HostBuffer::Create(std::make_shared<PinnedDriver>(host_driver(), gpu.device()),
                                   chunk_bytes, kChunks * chunk_bytes);
    REQUIRE_OK(made.status());
    buffer = made.value();
    REQUIRE_OK(buffer->take(kChunks, &blocks));
    block_at = buffer->pin(blocks).value();
    buffer->unpin(blocks);
    for (size_t i = 0; i < kChunks; ++i) *block_at[i] = static_cast<std::byte>(i + 101);
  }
  std::byte* chunk(size_t i) const { return base + i * chunk_bytes; }

  const size_t chunk_bytes;
  std::shared_ptr<CudaDriver> driver;
  std::byte* base = nullptr;
  std::shared_ptr<HostBuffer> buffer;
  std::vector<BlockId> blocks;
  std::vector<std::byte*> block_at;
};

std::unique_ptr<CopyLink> make_link(Gpu& gpu) {
  auto link = CudaLink::Create(gpu.device());
  REQUIRE_OK(link.status());
  return std::move(link.value());
}

TEST(several_copies_are_under_way_before_anybody_waits) {
  Gpu gpu;
  Ends ends(gpu);
  const auto link = make_link(gpu);
  CHECK(link->duplex());
  const size_t depth = CudaLink::kDepth;
  REQUIRE(depth < kChunks);
  for (size_t i = 0; i < depth; ++i) {
    REQUIRE_OK(link->begin(kOffload, ends.chunk(i), ends.block_at[i], kCudaChunk));
  }
  CHECK_EQ(gpu.fake.calls_of("cuEventSynchronize"), 0u);
  CHECK_EQ(static_cast<int>(*ends.block_at[0]), 101);
  REQUIRE_OK(link->begin(kOffload, ends.chunk(depth), ends.block_at[depth], kCudaChunk));
  CHECK_EQ(gpu.fake.calls_of("cuEventSynchronize"), 1u);
  CHECK_EQ(static_cast<int>(*ends.block_at[0]), 1);
  CHECK_EQ(static_cast<int>(*ends.block_at[1]), 102);
  // The other way is not held up, and not waited for.
  REQUIRE_OK(link->begin(kFetch, ends.chunk(kChunks - 1), ends.block_at[kChunks - 1], kCudaChunk));
  REQUIRE_OK(link->finish(kOffload));
  CHECK_EQ(gpu.fake.calls_of("cuEventSynchronize"), 2u);
  for (size_t i = 0; i <= depth; ++i) CHECK_EQ(static_cast<size_t>(*ends.block_at[i]), i + 1);
  CHECK_EQ(static_cast<size_t>(*ends.chunk(kChunks - 1)), kChunks);
  REQUIRE_OK(link->finish(kFetch));
  CHECK_EQ(static_cast<size_t>(*ends.chunk(kChunks - 1)), 100 + kChunks);
  REQUIRE_OK(link->finish(kFetch));
  CHECK_EQ(gpu.fake.calls_of("cuCtxSynchronize") + gpu.fake.calls_of("cuStreamSynchronize"), 0u);
}

// Does all that copies take while some calls fail; false once they come after that. Several in a
// row come when the link is there: what is not destroyed when opening it fails is lost.
bool copy_with_faults_at(uint64_t n, uint64_t in_a_row) {
  Gpu gpu({kSmallChunk});
  Ends ends(gpu, kSmallChunk);
  std::unique_ptr<CopyLink> link;
  const auto fail = [&] {
    gpu.fake.faults().fail(gpu.fake.faults().calls() + n, in_a_row, Fault::kClean);
  };
  if (in_a_row == 1) fail();
  auto made = CudaDevice::Open(gpu.fake.api(), 0);
  Status s = made.status();
  if (s.ok()) {
    auto opened = CudaLink::Create(made.value());
    s = opened.status();
    if (s.ok()) link = std::move(opened.value());
  }
  if (in_a_row > 1) fail();
  size_t begun = 0;
  while (s.ok() && begun < kChunks) {
    s = link->begin(kOffload, ends.chunk(begun), ends.block_at[begun], kSmallChunk);
    begun += s.ok();
  }
  if (link) {
    Status over = link->finish(kOffload);
    // Where nobody could say, somebody asks again.
    for (int i = 0; i < 3 && over.code() == Code::kBroken; ++i) over = link->finish(kOffload);
    CHECK(over.code() != Code::kBroken);
    if (s.ok()) s = over;
    if (over.ok()) {
      for (size_t i = 0; i < begun; ++i) {
        CHECK_EQ(static_cast<size_t>(*ends.block_at[i]), i + 1);
      }
    }
  }
  const bool met = gpu.fake.faults().faults() > 0;
  CHECK(s.ok() || met);
  gpu.fake.faults().fail(0, 0, Fault::kClean);
  return met;
}

// That what is still under way is neither unmapped nor unpinned the fake sees to.
TEST(any_calls_may_fail_and_nothing_stays_under_way) {
  if (check::under_tsan) return;  // No threads.
  for (const uint64_t in_a_row : {1, 3}) {
    uint64_t n = 1;
    while (copy_with_faults_at(n, in_a_row)) ++n;
    CHECK(n > 40);
  }
}

TEST(blocks_of_a_copy_of_which_nobody_knows_are_abandoned) {
  Gpu gpu;
  Ends ends(gpu);
  {
    Copier copier(make_link(gpu));
    const auto first = [&](size_t) -> Result<std::byte*> { return ends.chunk(0); };
    // After push, copy, record, pop and push: waiting for the event and the stream, and using
    // the context to wait for all of the device.
    gpu.fake.faults().fail(gpu.fake.faults().calls() + 6, 3, Fault::kClean);
    const Ticket ticket = copier.submit(kOffload, first, ends.buffer, {ends.blocks[0]}).value();
    const Status s = copier.wait(ticket);
    CHECK_EQ(s.code(), Code::kDriver);
    CHECK(says(s, "whether it is over cannot be told"));
    CHECK_EQ(gpu.fake.faults().faults(), 3u);
    CHECK_OK(ends.buffer->give_back(ends.blocks));
    CHECK_EQ(ends.buffer->usage().used, kCudaChunk);
    CHECK_EQ(ends.buffer->trim().value(), (kChunks - 1) * kCudaChunk);
    REQUIRE_OK(ends.driver->synchronize());  // For the chunk's sake.
  }
}

// Lets a copier's thread through only when it is opened.
class Gate {
 public:
  ChunkAddress before(std::byte* chunk) {
    return [this, chunk](size_t) -> Result<std::byte*> {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return open_; });
      return chunk;
    };
  }
  void open() {
    std::lock_guard<std::mutex> lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false;
};

TEST(the_ways_out_and_in_do_not_wait_for_each_other_unless_they_share_a_block) {
  Gpu gpu;
  Ends ends(gpu);
  Copier copier(make_link(gpu));
  Gate gate;
  const auto at = [&](size_t i) {
    return [chunk = ends.chunk(i)](size_t) -> Result<std::byte*> { return chunk; };
  };
  const Ticket out =
      copier.submit(kOffload, gate.before(ends.chunk(0)), ends.buffer, {ends.blocks[5]}).value();
  const Ticket in = copier.submit(kFetch, at(1), ends.buffer, {ends.blocks[1]}).value();
  const Ticket after_out = copier.submit(kFetch, at(2), ends.buffer, {ends.blocks[5]}).value();
  CHECK_OK(copier.wait(in));
  CHECK(!copier.done(out).value());
  CHECK(!copier.done(after_out).value());
  CHECK_EQ(static_cast<int>(*ends.chunk(1)), 102);
  gate.open();
  CHECK_OK(copier.wait(after_out));
  CHECK(copier.done(out).value());
  CHECK_EQ(static_cast<int>(*ends.chunk(2)), 1);  // What the way out has put into the block.
}

TEST(closing_a_copier_ends_both_ways) {
  Gpu gpu;
  Ends ends(gpu);
  Gate gate;
  Copier copier(make_link(gpu));
  std::vector<Ticket> tickets;
  for (const auto direction : {kOffload, kFetch}) {
    for (int i = 0; i < 3; ++i) {
      const std::vector<BlockId> two = {ends.blocks[0], ends.blocks[1]};
      tickets.push_back(
          copier.submit(direction, gate.before(ends.chunk(0)), ends.buffer, two).value());
    }
  }
  std::thread closer([&] { copier.close(); });
  while (copier.submit(kFetch, gate.before(ends.chunk(0)), ends.buffer, {}).ok()) {
    std::this_thread::yield();
  }
  gate.open();
  closer.join();
  for (const Ticket ticket : tickets) CHECK_EQ(copier.wait(ticket).code(), Code::kDriver);
  CHECK_OK(ends.buffer->give_back(ends.blocks));
}

TEST(a_copy_that_fails_frees_its_blocks_and_the_next_one_works) {
  Gpu gpu;
  Ends ends(gpu);
  Copier copier(make_link(gpu));
  const auto all = [&](size_t i) -> Result<std::byte*> { return ends.chunk(i); };
  gpu.fake.faults().fail(gpu.fake.faults().calls() + 10, 1, Fault::kClean);
  const Ticket first = copier.submit(kOffload, all, ends.buffer, ends.blocks).value();
  const Status s = copier.wait(first);
  CHECK_EQ(s.code(), Code::kDriver);
  CHECK(says(s, "cuda:0"));
  CHECK_OK(copier.wait(copier.submit(kOffload, all, ends.buffer, ends.blocks).value()));
  for (size_t i = 0; i < kChunks; ++i) CHECK_EQ(static_cast<size_t>(*ends.block_at[i]), i + 1);
  CHECK_EQ(copier.stats().offload.calls, 1u);
  CHECK_OK(ends.buffer->give_back(ends.blocks));
}

TEST(blocks_are_pinned_while_they_have_memory) {
  Gpu gpu;
  auto buffer = HostBuffer::Create(std::make_shared<PinnedDriver>(host_driver(), gpu.device()),
                                   kCudaChunk, 8 * kCudaChunk);
  REQUIRE_OK(buffer.status());
  std::vector<BlockId> blocks;
  REQUIRE_OK(buffer.value()->take(3, &blocks));
  CHECK_EQ(gpu.fake.registered_bytes(), 3 * kCudaChunk);
  REQUIRE_OK(buffer.value()->prepare(5 * kCudaChunk));
  CHECK_EQ(gpu.fake.registered_bytes(), 5 * kCudaChunk);
  const uint64_t calls = gpu.fake.calls_of("cuMemHostRegister_v2");
  REQUIRE_OK(buffer.value()->take(2, &blocks));
  CHECK_EQ(gpu.fake.calls_of("cuMemHostRegister_v2"), calls);
  REQUIRE_OK(buffer.value()->prepare(SIZE_MAX));
  CHECK_EQ(buffer.value()->usage().physical, 8 * kCudaChunk);
  CHECK_OK(buffer.value()->give_back(blocks));
  CHECK_EQ(buffer.value()->trim().value(), 8 * kCudaChunk);
  CHECK_EQ(gpu.fake.registered_bytes(), 0u);
}

}  // namespace
}  // namespace ellm
