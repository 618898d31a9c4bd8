// What decides which work the CUDA kernels do, against counting token by token.
#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <vector>

#include "cuda_fixtures.h"

namespace ellm::cuda {
namespace {

TEST(division_by_multiplication_is_exact) {
  std::mt19937_64 random(check::seed);
  std::vector<int32_t> divisors = {1,  2,  3,  5,   7,   8,     16,        24,
                                   40, 56, 64, 127, 641, 65537, 2147483647};
  for (int i = 0; i < 200; ++i) divisors.push_back(1 + random() % 100000);
  for (const int32_t d : divisors) {
    const Divisor by(d);
    std::vector<int32_t> dividends = {0, 1, 2147483647, 2147483646, d - 1, d};
    for (int i = 0; i < 500; ++i) {
      const int64_t quotient = random() % (2147483647 / d + int64_t{1});
      for (const int64_t n : {quotient * d - 1, quotient * d, quotient * d + d - 1}) {
        if (n >= 0 && n <= 2147483647) dividends.push_back(static_cast<int32_t>(n));
      }
    }
    for (const int32_t n : dividends) {
      if (!CHECK_EQ(by.quotient(n), n / d) || !CHECK_EQ(by.remainder(n), n % d)) return;
    }
  }
}

TEST(tokens_lie_where_the_layout_says) {
  for (const int64_t tile : {8, 16, 24, 56, 64}) {
    KvLayout layout;
    layout.layers = 3;
    layout.kv_heads = 5;
    layout.head_dim = 96;
    layout.element_bytes = 2;
    layout.tile_tokens = tile;
    layout.chunk_bytes = 1 << 20;
    layout.max_tokens = 1000;
    layout.slot_bytes = layout.chunks_for(1000) * layout.chunk_bytes;
    layout.num_slots = 7;
    char* base = reinterpret_cast<char*>(uintptr_t{1} << 40);
    const KvView view(layout, base);
    for (int32_t token = 0; token < 1000; ++token) {
      for (const int32_t kv : {0, 1}) {
        const char* at = view.head(6, 2, kv, 4) + view.token(token);
        const int64_t offset = 6 * layout.slot_bytes + layout.offset_bytes(2, kv, 4, token);
        if (!CHECK_EQ(at - base, offset)) return;
      }
      CHECK_EQ(view.token_or_first(token, true), view.token(token));
    }
    // What is copied as zeros has addresses too, and they are in the same 8 tokens or in the first.
    CHECK_EQ(view.token_or_first(999, false), 0);
    CHECK_EQ(view.within_eight(3, 32), 3 * view.row_bytes + 32);
    CHECK_EQ(view.within_eight(7, 240), 8 * view.row_bytes - 16);
  }
}

TEST(parts_cover_what_a_row_sees) {
  for (const int32_t kv_heads : {1, 2, 8, 32}) {
    const int32_t most = most_parts(kv_heads);
    for (const int32_t window : {0, 1, 100, 256, 1000, 4096}) {
      std::set<int32_t> positions = {0, 1, 254, 255, 256, 257, 4095, 4096, 8191, 32767, 131071};
      std::mt19937_64 random(check::seed);
      for (int i = 0; i < 300; ++i) positions.insert(static_cast<int32_t>(random() % 140000));
      for (const int32_t position : positions) {
        const Parts parts = parts_of(position, window, most);
        const int32_t begin = window > 0 ? std::max(0, position + 1 - window) : 0;
        CHECK(parts.tokens >= kLeastPartTokens);
        CHECK_EQ(parts.tokens % kPartGranule, 0);
        CHECK(parts.count >= 1 && parts.count <= parts_capacity(position + 1, most));
        // The first part holds the first token seen, the last one the row's own.
        CHECK(parts.first * parts.tokens <= begin);
        CHECK((parts.first + 1) * parts.tokens > begin);
        CHECK((parts.first + parts.count - 1) * parts.tokens <= position);
        CHECK((parts.first + parts.count) * parts.tokens > position);
      }
    }
  }
}

TEST(tiles_are_those_with_a_visible_token) {
  std::mt19937_64 random(check::seed);
  for (int round = 0; round < 300; ++round) {
    const int32_t first = static_cast<int32_t>(random() % 300);
    const int32_t last = first + static_cast<int32_t>(random() % 40);
    const int32_t window = random() % 2 == 0 ? 0 : 1 + static_cast<int32_t>(random() % 200);
    const auto sees = [&](int32_t position, int32_t token) {
      return token <= position && (window == 0 || token > position - window);
    };
    const int32_t size = 32 << random() % 3;
    const TileRange tiles = tiles_of(first, last, window, size);
    for (int32_t tile = 0; tile < 16; ++tile) {
      bool some = false;
      bool all = true;
      for (int32_t token = tile * size; token < (tile + 1) * size; ++token) {
        for (int32_t position = first; position <= last; ++position) {
          some |= sees(position, token);
          all &= sees(position, token);
        }
      }
      if (!CHECK_EQ(tile >= tiles.first && tile <= tiles.last, some)) return;
      if (!CHECK_EQ(sees_whole_tile(tile, first, last, window, size), all)) return;
    }
  }
}

// Random steps: the list that one emulated block writes against the spans themselves.
TEST(the_list_of_work_is_complete_and_fits) {
  std::mt19937_64 random(check::seed);
  bool long_and_short = false;  // in one step
  for (int round = 0; round < 40; ++round) {
    const int32_t group = 1 + static_cast<int32_t>(random() % 9);
    const int32_t kv_heads = 1 << random() % 4;
    const int32_t window = random() % 3 == 0 ? 700 : 0;
    const int64_t sequences = 1 + random() % 200;
    const bool decodes_only = round % 4 == 3;
    const auto used = static_cast<int32_t>(random() % (sequences + 1));
    const int64_t max_tokens = round % 2 == 0 ? 5000 : 60000;
    std::vector<int32_t> meta(8);
    std::vector<SequenceSpan> spans;
    int32_t rows = 0;
    for (int32_t i = 0; i < used; ++i) {
      const bool decode = decodes_only || random() % 2 == 0;
      const int32_t count = decode ? 1 : 1 + static_cast<int32_t>(random() % 300);
      const auto context = static_cast<int32_t>(random() % (max_tokens - count));
      spans.push_back({i, context, rows, count});
      for (const int32_t word : {i, context, rows, count}) meta.push_back(word);
      rows += count;
    }
    const int32_t header[] = {1, used, rows, 8};
    std::copy(std::begin(header), std::end(header), meta.begin());

    const AttentionShape shape = {
        Element::kBFloat16, decodes_only ? sequences : std::max<int64_t>(rows, sequences + 1),
        sequences,          kv_heads * group,
        kv_heads,           64,
        max_tokens};
    std::vector<char> memory(Workspace(shape, nullptr).bytes + 128);
    char* aligned = memory.data();
    while (reinterpret_cast<uintptr_t>(aligned) % 128 != 0) ++aligned;
    AttentionArgs args;
    args.step.words = meta.data();
    args.window = &window;
    args.q_heads = kv_heads * group;
    args.group = Divisor(group);
    args.workspace = Workspace(shape, aligned);
    const Workspace& space = args.workspace;
    CHECK_EQ(space.decodes_only(), decodes_only);
    emulator::run(1, kPrepareThreads, kPrepareSharedBytes, {}, [&] { list_work(args); });

    REQUIRE(space.header->decode_units <= int64_t{space.row_capacity} * space.parts_capacity);
    REQUIRE(space.header->prefill_units <= space.prefill_capacity);
    CHECK_EQ(space.header->decode_taken, 0);
    CHECK_EQ(space.header->prefill_taken, 0);
    std::set<std::pair<int32_t, int32_t>> decodes;   // span, part
    std::set<std::pair<int32_t, int32_t>> prefills;  // span, token
    const int32_t block_tokens = kPrefillRows / group;
    bool short_before = false;
    std::set<int32_t> decode_rows;
    for (int32_t i = 0; i < space.header->decode_units; ++i) {
      const DecodeUnit unit = space.decode_units[i];
      REQUIRE(unit.row >= 0 && unit.row < space.row_capacity);
      decode_rows.insert(unit.row);
      const int32_t span = space.decode_spans[unit.row];
      CHECK(decodes.insert({span, unit.part}).second);
      const Parts parts = parts_of(spans[span].context_tokens, window, space.most_parts);
      const bool is_long = parts.tokens >= kLongPartTokens;
      CHECK(!(is_long && short_before));
      long_and_short |= !is_long && i > 0 && !short_before;
      short_before |= !is_long;
    }
    for (const int32_t row : decode_rows) {
      for (int32_t i = 0; i < args.q_heads; ++i) {
        CHECK_EQ(space.arrivals[row * args.q_heads + i], 0);
      }
    }
    for (int32_t i = 0; i < space.header->prefill_units; ++i) {
      const PrefillUnit unit = space.prefill_units[i];
      REQUIRE(unit.span >= 0 && unit.span < used);
      for (int32_t t = 0; t < block_tokens; ++t) {
        const int32_t token = unit.block * block_tokens + t;
        if (token < spans[unit.span].row_count) CHECK(prefills.insert({unit.span, token}).second);
      }
    }
    for (int32_t i = 0; i < used; ++i) {
      if (spans[i].row_count == 1) {
        const Parts parts = parts_of(spans[i].context_tokens, window, space.most_parts);
        for (int32_t part = 0; part < parts.count; ++part) CHECK(decodes.erase({i, part}) == 1);
      } else {
        for (int32_t t = 0; t < spans[i].row_count; ++t) CHECK(prefills.erase({i, t}) == 1);
      }
    }
    CHECK(decodes.empty());
    CHECK(prefills.empty());
  }
  CHECK(long_and_short);
}

TEST(spans_are_found_by_row) {
  std::mt19937_64 random(check::seed);
  for (const int32_t count : {1, 2, 31, 32, 33, 100, 1024, 1500}) {
    std::vector<int32_t> meta(8);
    std::vector<int32_t> owner;
    for (int32_t i = 0; i < count; ++i) {
      for (const int32_t word : {i, 0, static_cast<int32_t>(owner.size()), 1}) meta.push_back(word);
      for (uint64_t n = 1 + random() % 3; n > 0; --n) owner.push_back(i);
    }
    const int32_t header[] = {1, count, static_cast<int32_t>(owner.size()), 8};
    std::copy(std::begin(header), std::end(header), meta.begin());
    DeviceStep step;
    step.words = meta.data();
    for (size_t row = 0; row < owner.size(); row += 1 + random() % 5) {
      int32_t found = -1;
      emulator::run(1, kWarp, 0, {}, [&] { found = find_span(step, static_cast<int32_t>(row)); });
      if (!CHECK_EQ(found, owner[row])) return;
    }
  }
}

TEST(workspaces_are_laid_out_without_overlap) {
  const AttentionShape shape = {Element::kFloat16, 300, 40, 24, 8, 96, 32768};
  char* base = reinterpret_cast<char*>(uintptr_t{1} << 40);
  const Workspace space(shape, base);
  const auto offset = [&](const void* at) { return static_cast<const char*>(at) - base; };
  const std::vector<std::pair<int64_t, int64_t>> areas = {
      {offset(space.header), sizeof(WorkHeader)},
      {offset(space.decode_spans), int64_t{space.row_capacity} * 4},
      {offset(space.decode_units), int64_t{space.row_capacity} * space.parts_capacity * 8},
      {offset(space.arrivals), int64_t{space.row_capacity} * 24 * 4},
      {offset(space.prefill_units), int64_t{space.prefill_capacity} * 8},
      {offset(space.stats), int64_t{space.row_capacity} * space.parts_capacity * 24 * 8},
      {offset(space.values), int64_t{space.row_capacity} * space.parts_capacity * 24 * 96 * 4}};
  int64_t end = 0;
  for (const auto& [begin, bytes] : areas) {
    CHECK(begin >= end);
    CHECK_EQ(begin % 128, 0);
    end = begin + bytes;
  }
  CHECK(end <= space.bytes && space.bytes < end + 128);
  CHECK_EQ(Workspace(shape, nullptr).bytes, space.bytes);
  const AttentionShape exact = {Element::kFloat32, 300, 40, 24, 8, 96, 32768};
  CHECK_EQ(Workspace(exact, nullptr).bytes, 0);
}

TEST(a_step_of_no_more_rows_than_sequences_has_no_work_for_prompts) {
  for (const int64_t rows : {1, 40}) {
    CHECK(Workspace({Element::kFloat16, rows, 40, 24, 8, 96, 32768}, nullptr).decodes_only());
  }
  CHECK(!Workspace({Element::kFloat16, 41, 40, 24, 8, 96, 32768}, nullptr).decodes_only());

  // Not even for a prompt that should not be there, which would be written to other memory.
  const AttentionShape shape = {Element::kFloat16, 4, 4, 24, 8, 96, 256};
  alignas(128) static char memory[1 << 20];
  const int32_t words[] = {1, 2, 4, 8, 0, 0, 0, 0, 0, 0, 0, 3, 1, 9, 3, 1};
  const int32_t window = 0;
  AttentionArgs args;
  args.step.words = words;
  args.window = &window;
  args.q_heads = 24;
  args.group = Divisor(3);
  args.workspace = Workspace(shape, memory);
  REQUIRE(args.workspace.bytes <= static_cast<int64_t>(sizeof memory));
  emulator::run(1, kPrepareThreads, kPrepareSharedBytes, {}, [&] { list_work(args); });
  CHECK_EQ(args.workspace.header->prefill_units, 0);
  CHECK_EQ(args.workspace.header->decode_units, 1);
}

// Of a multiprocessor, with what each block takes for itself: 228 KiB on compute capability 9.0,
// 164 KiB on 8.0 (CUDA programming guide, "Compute capabilities").
TEST(shared_memory_fits_the_multiprocessors) {
  constexpr int64_t kHopper = 228 << 10;
  constexpr int64_t kAmpere = 164 << 10;
  constexpr int64_t kOwn = 1 << 10;
  for (const int64_t bytes :
       {DecodeMemory<64>::kBytes, DecodeMemory<96>::kBytes, DecodeMemory<128>::kBytes,
        PrefillMemory<64>::kBytes, PrefillMemory<96>::kBytes, PrefillMemory<128>::kBytes}) {
    CHECK(2 * (bytes + kOwn) <= kHopper);
    CHECK(bytes + kOwn <= kAmpere);
  }
  CHECK(DecodeMemory<256>::kBytes + kOwn <= kAmpere);
  CHECK(PrefillMemory<256>::kBytes + kOwn <= kAmpere);
  CHECK(HopperMemory<64>::kBytes + kOwn <= kHopper);
  CHECK(HopperMemory<128>::kBytes + kOwn <= kHopper);
}

}  // namespace
}  // namespace ellm::cuda
