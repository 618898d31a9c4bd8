// Products of warpgroups on the emulated GPU: carried out when they are waited for, from what lies
// in shared memory then. A step that a GPU needs, and mostly does without, is an error if it is
// missing.
#pragma once

#include "cuda_emulator.h"

namespace ellm::cuda {

inline uint32_t shared_address(const void* at) {
  return static_cast<uint32_t>(static_cast<const char*>(at) - emulator::block->shared);
}

inline void publish_to_products() {
  emulator::Thread& self = emulator::self();
  for (const auto& landed : self.landed) {
    emulator::block->writes.publish(landed, emulator::block->all->round());
  }
  self.landed.clear();
}

inline void begin_products() { emulator::self().may_multiply = true; }
inline void commit_products() {
  emulator::Thread& self = emulator::self();
  for (auto& product : self.uncommitted_products) self.products.push_back(std::move(product));
  self.uncommitted_products.clear();
}
inline void wait_products() {
  emulator::Thread& self = emulator::self();
  if (!self.uncommitted_products.empty()) {
    throw std::runtime_error("products are waited for that were not committed");
  }
  for (const auto& product : self.products) product();
  self.products.clear();
  // What follows touches the registers.
  self.may_multiply = false;
  sync_warp();
}
template <class T, int32_t kTiles>
void settle(T (&)[kTiles][4]) {
  emulator::self().may_multiply = false;
}

namespace emulator {

// Element (major, minor) of the tile of 16-byte vectors that a descriptor names: minor elements
// follow each other, majors are 128 bytes apart; the vectors of a row are permuted by the address.
inline uint16_t tile_element(uint64_t tile, int32_t major, int32_t minor) {
  if (tile >> 62 != 1) throw std::runtime_error("the tile is not described as 128-byte swizzled");
  const auto start = static_cast<uint32_t>(tile & 0x3fff) << 4;
  const auto group_bytes = static_cast<uint32_t>(tile >> 16 & 0x3fff) << 4;
  const auto eight_bytes = static_cast<uint32_t>(tile >> 32 & 0x3fff) << 4;
  const uint32_t linear =
      start + major / 8 * eight_bytes + major % 8 * 128 + minor / 64 * group_bytes + minor % 64 * 2;
  const uint32_t swizzled = linear ^ ((linear >> 7 & 7) << 4);
  block->writes.check(swizzled, block->all->round());
  uint16_t bits;
  std::memcpy(&bits, block->shared + swizzled, sizeof bits);
  return bits;
}

// Row and column of accumulator `i` of column tile `j` in this lane's warpgroup.
inline int32_t product_row(int32_t i) {
  return self().index / kWarpLanes % 4 * 16 + lane() / 4 + i / 2 * 8;
}
inline int32_t product_column(int32_t j, int32_t i) { return 8 * j + lane() % 4 * 2 + i % 2; }

inline void issue(std::function<void()> product) {
  if (!self().may_multiply) {
    throw std::runtime_error("a product was not begun after its registers were touched");
  }
  self().uncommitted_products.push_back(std::move(product));
}

}  // namespace emulator

template <class E, int32_t kTiles>
void multiply_tiles(E, float (&d)[kTiles][4], uint64_t a, uint64_t b, bool accumulate) {
  emulator::issue([&d, a, b, accumulate] {
    for (int32_t j = 0; j < kTiles; ++j) {
      for (int32_t i = 0; i < 4; ++i) {
        float sum = accumulate ? d[j][i] : 0.0f;
        for (int32_t k = 0; k < 16; ++k) {
          sum += E::widen(emulator::tile_element(a, emulator::product_row(i), k)) *
                 E::widen(emulator::tile_element(b, emulator::product_column(j, i), k));
        }
        d[j][i] = sum;
      }
    }
  });
}

template <class E, int32_t kTiles>
void multiply_with_tile(E, float (&d)[kTiles][4], const uint32_t (&a)[4], uint64_t b) {
  const emulator::Operands mine = {{a[0], a[1], a[2], a[3]}, {}};
  const emulator::Meeting& all = emulator::warp_show(mine);
  std::vector<emulator::Operands> left;  // of the lanes that share a row with this one
  for (int32_t i = 0; i < 4; ++i) {
    left.push_back(all.shown<emulator::Operands>(emulator::lane() / 4 * 4 + i));
  }
  emulator::issue([&d, left, b] {
    for (int32_t j = 0; j < kTiles; ++j) {
      for (int32_t i = 0; i < 4; ++i) {
        for (int32_t k = 0; k < 16; ++k) {
          const uint32_t word = left[k % 8 / 2].a[i / 2 + k / 8 * 2];
          const auto bits = static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16);
          d[j][i] += E::widen(bits) *
                     E::widen(emulator::tile_element(b, k, emulator::product_column(j, i)));
        }
      }
    }
  });
}

}  // namespace ellm::cuda
