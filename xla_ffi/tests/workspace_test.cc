// Workspaces of kernels: what comes from the arena, what from the heap, and that it is all the same
// to the result.
#include "kernels/cpu/workspace.h"

#include <cstring>
#include <initializer_list>
#include <random>
#include <vector>

#include "fixtures.h"
#include "kernel_fixtures.h"
#include "kernels/cpu/arena_workspace.h"
#include "kernels/cpu/attention.h"
#include "kv/registry.h"

namespace ellm {
namespace {

// What passes through on the way to an arena.
class CountingSource : public ArenaWorkspace {
 public:
  using ArenaWorkspace::ArenaWorkspace;
  void* allocate(size_t bytes) override {
    ++calls;
    void* at = ArenaWorkspace::allocate(bytes);
    granted += at != nullptr;
    if (at != nullptr) std::memset(at, 0xff, bytes);  // NaN: the kernels count on nothing.
    return at;
  }
  int calls = 0, granted = 0;
};

TEST(memory_comes_from_the_source_and_goes_back) {
  const size_t c = page_bytes();
  const auto pool = make_pool(host_driver(), 4 * c);
  const auto arena = Arena::Create(pool, 8 * c).value();
  ArenaWorkspace source(arena);
  {
    const WorkspaceMemory some(&source, 2 * c + 1);
    CHECK_EQ(arena->usage().live, 3 * c);
    std::memset(some.get(), 1, 2 * c + 1);
    const WorkspaceMemory more(&source, 2 * c);  // The pool has one chunk left.
    CHECK_EQ(arena->usage().live, 3 * c);
    std::memset(more.get(), 2, 2 * c);
    CHECK_EQ(static_cast<int>(*static_cast<std::byte*>(some.get())), 1);
    const WorkspaceMemory none(&source, 0);
    CHECK(none.get() == nullptr);
  }
  CHECK_EQ(arena->usage().live, 0u);
  ArenaWorkspace without(nullptr);
  for (WorkspaceSource* s : std::initializer_list<WorkspaceSource*>{&without, nullptr}) {
    const WorkspaceMemory heap(s, 100);
    CHECK_EQ(reinterpret_cast<uintptr_t>(heap.get()) % 64, 0u);
    std::memset(heap.get(), 1, 100);
  }
}

// One decoding row over a context of several parts, which a lone thread would not divide.
std::vector<float> decode(const Kernels& kernels, KvCache& cache, int32_t slot,
                          const std::vector<float>& q, int64_t context, WorkspaceSource* source) {
  const KvLayout& layout = cache.layout();
  std::vector<float> out(q.size());
  AttentionArgs args;
  args.q = q.data();
  args.out = out.data();
  args.type = ElementType::kFloat32;
  args.q_heads = layout.kv_heads;
  args.kv = layout;
  args.kv_base = reinterpret_cast<char*>(cache.slot_base(0));
  args.layer = 1;
  args.window = 0;
  args.scale = 0.25f;
  args.soft_cap = 0.0f;
  args.part_tokens = 64;
  const SequenceSpan span = {slot, static_cast<int32_t>(context), 0, 1};
  attention(kernels, args, &span, 1, 64, run_serially, source);
  return out;
}

TEST(partial_results_of_attention_are_in_the_arena) {
  constexpr int64_t kContext = 500;
  const size_t c = page_bytes();
  const auto pool = make_pool(host_driver(), 80 * c);
  const auto cache = make_cache(pool, page_layout(2, kContext + 1));
  const int32_t slot = cache->take_slot(0).value();
  REQUIRE_OK(extend(*cache, {slot}, {kContext + 1}));
  std::mt19937_64 random(check::seed);
  std::normal_distribution<float> normal;
  auto* values = reinterpret_cast<float*>(cache->slot_base(slot));
  for (size_t i = 0; i < cache->mapped_bytes(slot) / sizeof(float); ++i) values[i] = normal(random);
  std::vector<float> q(cache->layout().kv_heads * cache->layout().head_dim);
  for (float& x : q) x = normal(random);

  for (const Kernels* kernels : machine_kernels()) {
    const std::vector<float> heap = decode(*kernels, *cache, slot, q, kContext, nullptr);
    const auto arena = Arena::Create(pool, 16 * c).value();
    CountingSource source(arena);
    CHECK(decode(*kernels, *cache, slot, q, kContext, &source) == heap);
    CHECK_EQ(source.calls, 1);
    CHECK_EQ(source.granted, 1);
    CHECK_EQ(arena->usage().live, 0u);
    CHECK(arena->usage().inactive > 0);
    CHECK_EQ(pool->usage().activation, arena->usage().mapped);
    // Short: the arena has nothing of its own, and the pool nothing to give.
    CHECK(arena->collect(SIZE_MAX).ok());
    const size_t rest = pool->usage().obtainable;
    REQUIRE_OK(pool->reserve_bytes(Owner::kWeights, rest));
    CHECK(decode(*kernels, *cache, slot, q, kContext, &source) == heap);
    CHECK_EQ(source.calls, 2);
    CHECK_EQ(source.granted, 1);
    CHECK_OK(pool->return_bytes(Owner::kWeights, rest));
  }
}

TEST(a_cache_is_registered_with_its_arena) {
  const auto pool = make_pool(host_driver(), 8 * page_bytes());
  const auto cache = make_cache(pool, page_layout(1, 8));
  const int32_t id = register_kv(cache);
  CHECK(find_arena(id) == nullptr);
  auto arena = Arena::Create(pool, page_bytes()).value();
  const std::weak_ptr<Arena> watched = arena;
  use_arena(id, std::move(arena));
  CHECK(find_arena(id) == watched.lock());
  CHECK(find_kv(id) == cache);
  use_arena(id + 1, watched.lock());
  CHECK(find_arena(id + 1) == nullptr);
  unregister_kv(id);
  CHECK(watched.expired());
  CHECK(find_arena(id) == nullptr);
}

}  // namespace
}  // namespace ellm
