// KvLayout: offsets worked out by hand, no overlap, the choice of chunk and tile.
#include <cstdint>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "fixtures.h"
#include "kv/layout.h"

namespace ellm {
namespace {

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * 1024;

KvLayout choose(int64_t layers, int64_t kv_heads, int64_t head_dim, int64_t element_bytes,
                int64_t max_tokens = 4096, int64_t num_slots = 4, int64_t granularity = 4096,
                int64_t scale_bytes = 0) {
  auto layout = KvLayout::Choose(layers, kv_heads, head_dim, element_bytes, max_tokens, num_slots,
                                 granularity, scale_bytes);
  REQUIRE_OK(layout.status());
  CHECK_OK(layout.value().validate());
  return layout.value();
}

TEST(offsets_by_hand) {
  // 2 layers, 3 heads, 4 dims of 2 bytes, tiles of 8 tokens in chunks of 4 KiB.
  // A token of a head is 8 bytes, a head of a tile 64, K (or V) of a layer 192, a layer 384.
  KvLayout l;
  l.layers = 2;
  l.kv_heads = 3;
  l.head_dim = 4;
  l.element_bytes = 2;
  l.tile_tokens = 8;
  l.chunk_bytes = 4 * kKiB;
  l.num_slots = 5;
  l.max_tokens = 20;
  l.slot_bytes = 12 * kKiB;
  CHECK_OK(l.validate());
  CHECK_EQ(l.token_bytes(), 96);
  CHECK_EQ(l.offset_bytes(0, 0, 0, 0), 0);
  CHECK_EQ(l.offset_bytes(0, 0, 0, 7), 56);
  CHECK_EQ(l.offset_bytes(0, 0, 1, 0), 64);
  CHECK_EQ(l.offset_bytes(0, 1, 0, 0), 192);
  CHECK_EQ(l.offset_bytes(1, 0, 0, 0), 384);
  CHECK_EQ(l.offset_bytes(1, 1, 2, 3), 384 + 192 + 128 + 24);
  CHECK_EQ(l.offset_bytes(0, 0, 0, 8), 4096);
  CHECK_EQ(l.offset_bytes(1, 1, 2, 19), 2 * 4096 + 384 + 192 + 128 + 24);
  CHECK_EQ(l.chunks_for(0), 0);
  CHECK_EQ(l.chunks_for(1), 1);
  CHECK_EQ(l.chunks_for(8), 1);
  CHECK_EQ(l.chunks_for(9), 2);
  CHECK_EQ(l.chunks_for(20), 3);
  CHECK_EQ(l.slot_chunks(), 3);
  CHECK_EQ(l.reserved_bytes(), 60 * kKiB);
}

KvLayout choose_scaled(int64_t layers, int64_t kv_heads, int64_t head_dim) {
  return choose(layers, kv_heads, head_dim, 1, 4096, 4, 4096, 4);
}

TEST(scaled_offsets_by_hand) {
  // 2 layers, 3 heads, 20 dims of int8, tiles of 9 tokens in chunks of 4 KiB. A token of a head is
  // 20 bytes, a head of a tile 180, K of a layer 540, from 576 on its 27 scales of 108 bytes, and
  // with them 704; a layer 1408.
  KvLayout l;
  l.layers = 2;
  l.kv_heads = 3;
  l.head_dim = 20;
  l.element_bytes = 1;
  l.scale_bytes = 4;
  l.tile_tokens = 9;
  l.chunk_bytes = 4 * kKiB;
  l.num_slots = 5;
  l.max_tokens = 20;
  l.slot_bytes = 12 * kKiB;
  CHECK_OK(l.validate());
  CHECK_EQ(l.token_bytes(), 12 * 24);
  CHECK_EQ(l.tile_bytes(), 2 * 1408);
  CHECK_EQ(l.offset_bytes(0, 0, 0, 0), 0);
  CHECK_EQ(l.offset_bytes(0, 0, 1, 8), 180 + 160);
  CHECK_EQ(l.scale_offset_bytes(0, 0, 0, 0), 576);
  CHECK_EQ(l.scale_offset_bytes(0, 0, 2, 8), 576 + 72 + 32);
  CHECK_EQ(l.offset_bytes(0, 1, 0, 0), 704);
  CHECK_EQ(l.offset_bytes(1, 1, 2, 19), 2 * 4096 + 1408 + 704 + 360 + 20);
  CHECK_EQ(l.scale_offset_bytes(1, 1, 2, 19), 2 * 4096 + 1408 + 704 + 576 + 72 + 4);
  CHECK_EQ(l.chunks_for(19), 3);
  // 14 such tokens need 4032 bytes, but 4352 where values and scales are aligned.
  l.tile_tokens = 13;
  CHECK_OK(l.validate());
  l.tile_tokens = 14;
  CHECK_EQ(l.validate().code(), Code::kInvalid);
}

TEST(int8_holds_nearly_twice_the_tokens_of_bfloat16) {
  // Layers, heads and dims, and tokens per chunk byte of int8 over those of bfloat16, at least:
  // (dim + 4) to 2 dim bytes for a row, and what chunks leave unused.
  const struct {
    int64_t layers, kv_heads, head_dim;
    double gain;
  } models[] = {{12, 4, 64, 1.99}, {16, 8, 64, 1.87},  {32, 8, 128, 1.93}, {28, 8, 128, 2.18},
                {24, 2, 64, 1.99}, {36, 2, 128, 1.96}, {5, 2, 32, 1.87}};
  for (const auto& m : models) {
    const KvLayout plain = choose(m.layers, m.kv_heads, m.head_dim, 2);
    const KvLayout scaled = choose_scaled(m.layers, m.kv_heads, m.head_dim);
    const double gain = static_cast<double>(scaled.tile_tokens * plain.chunk_bytes) /
                        static_cast<double>(plain.tile_tokens * scaled.chunk_bytes);
    if (gain >= m.gain) continue;
    std::cerr << m.layers << " layers, " << m.kv_heads << " heads of " << m.head_dim << ": " << gain
              << "\n";
    CHECK(gain >= m.gain);
  }
}

TEST(no_two_elements_overlap_and_a_tile_stays_in_its_chunk) {
  for (const int64_t head_dim : {5, 64, 80}) {
    const KvLayout l = choose(3, 2, head_dim, 2, 100, 1);
    const int64_t row = head_dim * l.element_bytes;
    std::set<int64_t> starts;
    for (int64_t token = 0; token < l.max_tokens; ++token) {
      for (int64_t layer = 0; layer < l.layers; ++layer) {
        for (int64_t kv = 0; kv < 2; ++kv) {
          for (int64_t head = 0; head < l.kv_heads; ++head) {
            const int64_t start = l.offset_bytes(layer, kv, head, token);
            CHECK(start >= 0 && start + row <= l.slot_bytes);
            CHECK_EQ(start / l.chunk_bytes, token / l.tile_tokens);
            CHECK_EQ((start + row - 1) / l.chunk_bytes, token / l.tile_tokens);
            starts.insert(start);
          }
        }
      }
    }
    CHECK_EQ(static_cast<int64_t>(starts.size()), l.max_tokens * l.layers * 2 * l.kv_heads);
    for (auto it = starts.begin(), next = std::next(it); next != starts.end(); ++it, ++next) {
      CHECK(*it + row <= *next);
    }
  }
}

TEST(no_value_overlaps_a_scale) {
  for (const int64_t head_dim : {5, 64, 80}) {
    for (const int64_t layers : {1, 3, 12}) {
      const KvLayout l = choose(layers, 3, head_dim, 1, 100, 1, 4096, 4);
      std::vector<char> taken(l.slot_bytes);
      const auto take = [&](int64_t at, int64_t bytes, int64_t token) {
        CHECK(at >= 0 && at + bytes <= l.slot_bytes);
        CHECK_EQ(at / l.chunk_bytes, token / l.tile_tokens);
        CHECK_EQ((at + bytes - 1) / l.chunk_bytes, token / l.tile_tokens);
        for (int64_t i = at; i < at + bytes; ++i) CHECK(!std::exchange(taken[i], 1));
      };
      for (int64_t token = 0; token < l.max_tokens; ++token) {
        for (int64_t layer = 0; layer < l.layers; ++layer) {
          for (int64_t kv = 0; kv < 2; ++kv) {
            for (int64_t head = 0; head < l.kv_heads; ++head) {
              take(l.offset_bytes(layer, kv, head, token), head_dim, token);
              take(l.scale_offset_bytes(layer, kv, head, token), 4, token);
            }
            CHECK_EQ(l.offset_bytes(layer, kv, 0, 0) % 64, 0);
            CHECK_EQ(l.scale_offset_bytes(layer, kv, 0, 0) % 64, 0);
          }
        }
      }
    }
  }
}

TEST(the_chunk_that_wastes_least_is_chosen) {
  // 32 layers, 8 heads of 128 in 2 bytes: 128 KiB a token, 16 of them in 2 MiB.
  KvLayout l = choose(32, 8, 128, 2, 131072, 256);
  CHECK_EQ(l.chunk_bytes, 2 * kMiB);
  CHECK_EQ(l.tile_tokens, 16);
  CHECK_EQ(l.slot_bytes, int64_t{16} << 30);
  // 6 KiB a token: 40 of 42 in 256 KiB waste less than 16 of 21 in 128 or 64 of 85 in 512 KiB.
  l = choose(6, 2, 64, 4);
  CHECK_EQ(l.chunk_bytes, 256 * kKiB);
  CHECK_EQ(l.tile_tokens, 40);
  // 1 KiB a token: 64 in 64 KiB waste nothing.
  l = choose(2, 1, 64, 4);
  CHECK_EQ(l.chunk_bytes, 64 * kKiB);
  CHECK_EQ(l.tile_tokens, 64);
  // 4 KiB a token: 16 in 64 KiB, 32 in 128 and 64 in 256 waste nothing; the smallest wins.
  l = choose(4, 2, 64, 4);
  CHECK_EQ(l.chunk_bytes, 64 * kKiB);
  CHECK_EQ(l.tile_tokens, 16);
  // 64 bytes a token: the tile is capped.
  l = choose(1, 1, 16, 2);
  CHECK_EQ(l.chunk_bytes, 64 * kKiB);
  CHECK_EQ(l.tile_tokens, 64);
  // 512 KiB a token (an 80-layer model without grouped heads, say): past 2 MiB, to 8.
  l = choose(64, 16, 128, 2);
  CHECK_EQ(l.chunk_bytes, 8 * kMiB);
  CHECK_EQ(l.tile_tokens, 16);
  // A device with 2 MiB pages: 128 KiB a token as before, 12 KiB fill it with more than 64 tokens,
  // and for 1 KiB the tile is capped.
  l = choose(32, 8, 128, 2, 131072, 256, 2 * kMiB);
  CHECK_EQ(l.chunk_bytes, 2 * kMiB);
  CHECK_EQ(l.tile_tokens, 16);
  l = choose(24, 2, 64, 2, 4096, 4, 2 * kMiB);
  CHECK_EQ(l.chunk_bytes, 2 * kMiB);
  CHECK_EQ(l.tile_tokens, 168);
  l = choose(2, 1, 64, 4, 4096, 4, 2 * kMiB);
  CHECK_EQ(l.chunk_bytes, 2 * kMiB);
  CHECK_EQ(l.tile_tokens, 256);
}

TEST(every_choice_is_sound) {
  for (const int64_t layers : {1, 2, 7, 28, 80, 126}) {
    for (const int64_t heads : {1, 2, 3, 8, 32}) {
      for (const int64_t head_dim : {16, 64, 80, 96, 128, 256}) {
        for (const int64_t element_bytes : {1, 2, 4}) {
          if (layers * heads * head_dim * element_bytes * 2 > 4 * kMiB) continue;
          const KvLayout l = choose(layers, heads, head_dim, element_bytes);
          CHECK(l.tile_tokens >= 16 && l.tile_tokens <= 64 && l.tile_tokens % 8 == 0);
          CHECK(l.chunk_bytes >= 64 * kKiB && l.chunk_bytes <= 64 * kMiB);
          // Within 2 MiB a tile of at least 16 wastes less than a third, unless it is capped.
          const int64_t used = l.tile_tokens * l.token_bytes();
          CHECK(l.tile_tokens == 64 || 3 * used > l.chunk_bytes);
        }
      }
    }
  }
}

TEST(sizes_that_cannot_be_are_refused) {
  const int64_t good[] = {2, 2, 64, 4, 4096, 4, 4096};
  const auto code_with = [&](int field, int64_t value) {
    std::vector<int64_t> v(std::begin(good), std::end(good));
    v[field] = value;
    return KvLayout::Choose(v[0], v[1], v[2], v[3], v[4], v[5], v[6]).status().code();
  };
  CHECK_EQ(code_with(0, 2), Code::kOk);
  for (int field = 0; field < 7; ++field) {
    for (const int64_t value : {int64_t{0}, int64_t{-1}, INT64_MIN, INT64_MAX}) {
      CHECK_EQ(code_with(field, value), Code::kInvalid);
    }
  }
  CHECK_EQ(code_with(3, 3), Code::kInvalid);
  CHECK_EQ(code_with(3, 8), Code::kInvalid);
  CHECK_EQ(code_with(6, 3000), Code::kInvalid);
  const auto scaled = [](int64_t element_bytes, int64_t scale_bytes) {
    return KvLayout::Choose(2, 2, 64, element_bytes, 4096, 4, 4096, scale_bytes).status();
  };
  CHECK_OK(scaled(1, 4));
  CHECK_EQ(scaled(2, 4).code(), Code::kInvalid);
  CHECK_EQ(scaled(1, 2).code(), Code::kInvalid);
  CHECK_EQ(scaled(1, -4).code(), Code::kInvalid);
  // One token larger than any chunk; the product overflows; more addresses than there are.
  CHECK_EQ(KvLayout::Choose(1024, 32, 128, 4, 10, 1).status().code(), Code::kInvalid);
  CHECK_EQ(KvLayout::Choose(INT32_MAX, INT32_MAX, INT32_MAX, 4, 10, 1).status().code(),
           Code::kInvalid);
  const Status s = KvLayout::Choose(32, 8, 128, 2, 131072, 8192).status();
  CHECK_EQ(s.code(), Code::kInvalid);
  CHECK(s.message().find("lower num_slots or max_tokens") != std::string::npos);
  CHECK_OK(KvLayout::Choose(32, 8, 128, 2, 131072, 8191).status());
  CHECK_EQ(KvLayout::Choose(32, 8, 128, 2, INT32_MAX, INT32_MAX).status().code(), Code::kInvalid);
}

TEST(a_layout_made_by_hand_is_checked) {
  const KvLayout good = choose(2, 2, 64, 4);
  const auto code_with = [&](auto change) {
    KvLayout l = good;
    change(&l);
    return l.validate().code();
  };
  CHECK_EQ(code_with([](KvLayout*) {}), Code::kOk);
  CHECK_EQ(code_with([](KvLayout* l) { l->tile_tokens = 12; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->tile_tokens = 0; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->tile_tokens *= 8; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->chunk_bytes += 1; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->slot_bytes -= l->chunk_bytes; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->slot_bytes += 1; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->num_slots = 0; }), Code::kInvalid);
  CHECK_EQ(code_with([](KvLayout* l) { l->num_slots = INT32_MAX; }), Code::kInvalid);
}

}  // namespace
}  // namespace ellm
